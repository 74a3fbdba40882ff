"""The child's end of the pipe to its parent.

In: a function that serves, and a job, pickled. Out: messages. The child ends when the pipe does, however its parent
ended.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from fp8gate.calibrate.processes.messages import Broken


class Channel:
    """Messages from the parent and to it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def receive(self) -> Any:
        """The next message, as soon as there is one. Raises SystemExit where the parent dismisses this process."""
        message = self._inbox.get()
        if message is None:
            raise SystemExit
        return message

    def send(self, message: object) -> None:
        self._connection.send(message)

    def _listen(self) -> None:
        """Read on a thread of its own, so that the end of the pipe ends this process in the middle of any work."""
        try:
            while True:
                self._inbox.put(self._connection.recv())
        except (EOFError, OSError):
            os._exit(1)


def run_child(connection: Connection, serve: Callable[[Channel, Any], None], job: bytes) -> None:
    """A child's main function: it serves until the parent closes the pipe. job: pickled."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    channel = Channel(connection)
    with contextlib.suppress(BrokenPipeError):
        try:
            unpickled = pickle.loads(job)
        except Exception as error:
            channel.send(Broken(f"not to be had in another process: {type(error).__name__}: {error}"))
            return
        gc.freeze()  # what the fork server imported is never garbage
        serve(channel, unpickled)
