"""Hands values from any thread to one thread that sleeps in a poll of file descriptors."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """A queue whose file descriptor becomes readable when something lies in it.

    Any thread may `put`; one thread polls `fileno()` and calls `take_all`. `close` is called by that same thread.
    """

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The descriptor to poll for reading."""
        return self._event

    def put(self, item: T) -> None:
        """Add an item and wake the reader. Items put after `close` are dropped."""
        with self._lock:  # so that no write follows `close` into a descriptor that somebody else has got
            if not self._closed:
                self._items.put(item)
                os.eventfd_write(self._event, 1)

    def take_all(self) -> list[T]:
        """Everything put so far, oldest first."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        taken: list[T] = []
        while True:
            try:
                taken.append(self._items.get_nowait())
            except queue.Empty:
                return taken

    def close(self) -> None:
        """Give the descriptor back. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._event)
