"""Processes of one test are recognised by a word in their environment, so that none can hide."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil

FAKE = (sys.executable, "-S", str(Path(__file__).with_name("fake_process.py")))
MARK = "VLLM_DISAGG_TEST_MARK"


def marked(mark: str) -> list[psutil.Process]:
    """All living processes that were started with this mark, however far down and in whatever session."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.pid != psutil.Process().pid]


def assert_gone(mark: str, *, within_s: float) -> None:
    """Fail unless every process with this mark ends in time."""
    deadline_s = time.monotonic() + within_s
    while left := marked(mark):
        assert time.monotonic() < deadline_s, [process.cmdline() for process in left]
        time.sleep(0.05)


def wait_for(condition: object, *, within_s: float = 10.0) -> None:
    """Wait until `condition()` holds."""
    assert callable(condition)
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{condition} did not come true"
        time.sleep(0.05)
