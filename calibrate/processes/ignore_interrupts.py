"""Imported first by the process that workers are forked from: Ctrl-C is the sweep's to handle, during imports too."""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
