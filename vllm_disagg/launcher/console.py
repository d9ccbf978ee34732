"""Plain progress for people: lines that stay, and one status line that is rewritten on a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TextIO

_STATUS_EVERY_S = 10.0


class Console:
    """Writes to one stream. Where that is not a terminal, the status becomes an ordinary line every ten seconds."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._status = ""
        self._last_status_s = time.monotonic()

    def line(self, text: str) -> None:
        """Write a line that stays."""
        self._write(self._wiped() + text + "\n")

    def status(self, text: str) -> None:
        """Show what is going on now."""
        if self._terminal:
            self._write(self._wiped() + text)
            self._status = text
        elif time.monotonic() - self._last_status_s >= _STATUS_EVERY_S:
            self._last_status_s = time.monotonic()
            self.line(text)

    def _wiped(self) -> str:
        wipe, self._status = "\r\x1b[K" if self._status else "", ""
        return wipe

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a closed terminal must not keep processes from being ended
            self._stream.write(text)
            self._stream.flush()
