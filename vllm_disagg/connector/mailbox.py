"""Hands values from any thread to one thread that sleeps in a poll of file descriptors."""

from __future__ import annotations

import contextlib
import os
import queue
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

    def fileno(self) -> int:
        """The descriptor to poll for reading."""
        return self._event

    def put(self, item: T) -> None:
        """Add an item and wake the reader. Items put after `close` are dropped."""
        if self._closed:
            return
        self._items.put(item)
        try:
            os.eventfd_write(self._event, 1)
        except OSError:  # closed meanwhile: the reader is gone and wants nothing more
            return

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
        if not self._closed:
            self._closed = True
            os.close(self._event)
