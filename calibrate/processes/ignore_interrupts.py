"""Imported by the fork server first: Ctrl-C is the parent's to handle, also while the server imports."""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
