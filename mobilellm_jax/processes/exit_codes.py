"""Exit codes that more than the command line gives: a thread may have to end the process."""

FAILED = 1
SAVED_REQUEUE_ME = 75  # EX_TEMPFAIL: a scheduler may start the same command again
