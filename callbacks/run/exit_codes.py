"""Exit statuses of a run that has saved and stopped, for all who start runs."""

PREEMPTED = 85  # after SIGTERM or SIGUSR1: the scheduler may requeue
INTERRUPTED = 130  # after Ctrl-C, as shells have it
