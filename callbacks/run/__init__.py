"""Run management: checkpoints, logs, records, preemption, progress."""
