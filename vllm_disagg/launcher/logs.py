"""What a dead process's log says, short enough to show."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NOISE = re.compile(r"nanobind|^ - leaked |^ - \.\.\. skipped|resource_tracker|^\s*warnings\.warn\(")
"""What Python and bindings write about themselves when vLLM's processes end; it would hide the cause of their end."""

_HARMLESS = re.compile(r"\b(?:WARNING|INFO|DEBUG)\b")
_ERROR = re.compile(
    r"\b(?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception)\b: \S|\bdied unexpectedly\b|\bFatal Python error\b|\berror: \S"
)


def last_words(text: str, num_lines: int) -> list[str]:
    """The last lines that say something, and above them the first error where it lies further up.

    Args:
        text: a log, or its end.
        num_lines: how many last lines to keep.
    """
    lines = [line for line in text.splitlines() if line.strip() and not _NOISE.search(line)]
    last = lines[-num_lines:]
    error = first_error(lines)
    return last if error is None or error in last else [error, "...", *last]


def first_error(lines: Sequence[str]) -> str | None:
    """The first line that names an error: in vLLM's logs the later ones mostly say that there was an earlier one."""
    return next((line for line in lines if _ERROR.search(line) and not _HARMLESS.search(line)), None)
