"""Exit statuses of a run that has saved its state and stopped."""

PREEMPTED = 85  # after SIGTERM, SIGUSR1 or SIGHUP: the scheduler may requeue
INTERRUPTED = 130  # after Ctrl-C, as in shells
