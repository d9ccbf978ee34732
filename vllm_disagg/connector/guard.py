"""Keeps the connector's threads alive: what goes wrong with one item or one turn costs that one only."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

logger = logging.getLogger(__name__)

PAUSE_S = 0.1
"""After a failed turn, so that a failure that repeats costs little."""

T = TypeVar("T")


class Guard:
    """Logs each kind of failure once with its traceback, and counts the rest."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen: set[str] = set()
        self.num_failures = 0

    def run(self, turn: Callable[[], bool]) -> None:
        """Call `turn` until it returns False, whatever it raises."""
        while True:
            try:
                if not turn():
                    return
            except Exception as error:
                self.failed(error)
                threading.Event().wait(PAUSE_S)

    def each(self, items: Iterable[T], handle: Callable[[T], None]) -> None:
        """Handle every item; one that fails does not take the others with it."""
        for item in items:
            try:
                handle(item)
            except Exception as error:
                self.failed(error)

    def failed(self, error: Exception) -> None:
        """Note a failure."""
        self.num_failures += 1
        kind = f"{type(error).__name__}: {error}"
        if kind not in self._seen and len(self._seen) < 100:
            self._seen.add(kind)
            logger.error("%s.failed (further ones of this kind are not logged)", self._name, exc_info=error)
