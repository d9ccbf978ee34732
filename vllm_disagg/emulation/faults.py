"""Faults on demand, for tests of what surrounds the device.

The environment variable `VLLM_DISAGG_FAULTS` names a JSON file, read again whenever it has changed:

    {"faults": [
        {"kind": "slow", "factor": 3.0, "from_step": 10, "to_step": 20},
        {"kind": "stall", "at_step": 30, "seconds": 5.0},
        {"kind": "crash", "at_step": 40},
        {"kind": "corrupt_read", "every": 7},
        {"kind": "fail_read", "every": 5}
    ]}

Steps and reads count from 1, from the engine's start; each rank counts its own reads. Nothing that comes over the
network can set it.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vllm_disagg.emulation.settings import FAULTS_ENV
from vllm_disagg.errors import ConfigError

logger = logging.getLogger(__name__)

_FIELDS: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "slow": (("factor",), ("from_step", "to_step")),
    "stall": (("at_step", "seconds"), ()),
    "crash": (("at_step",), ()),
    "corrupt_read": (("every",), ()),
    "drop_block": (("every",), ()),
    "late_block": (("every", "seconds"), ()),
    "fail_read": (("every",), ()),
}
"""Kind to the fields it needs and those it may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault; which fields count depends on the kind."""

    kind: str
    factor: float = 1.0
    from_step: float = 1
    to_step: float = math.inf
    at_step: float = 0
    seconds: float = 0.0
    every: float = 1


class Faults:
    """The faults that are in force.

    Args:
        path: the file; None for no faults, ever.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None
        self._faults: tuple[Fault, ...] = ()

    @classmethod
    def from_environment(cls) -> Faults:
        """Those of this process."""
        path = os.environ.get(FAULTS_ENV)
        return cls(Path(path) if path else None)

    def step_factor(self, step: int) -> float:
        """By how much this step is slower."""
        return math.prod(fault.factor for fault in self._of("slow") if fault.from_step <= step <= fault.to_step)

    def stall_s(self, step: int) -> float:
        """How long the device stands still before this step."""
        return sum(fault.seconds for fault in self._of("stall") if fault.at_step == step)

    def crashes(self, step: int) -> bool:
        """Whether the engine dies at this step."""
        return any(fault.at_step == step for fault in self._of("crash"))

    def of_read(self, read: int) -> tuple[Fault, ...]:
        """What happens to this KV transfer."""
        kinds = ("corrupt_read", "drop_block", "late_block", "fail_read")
        return tuple(fault for fault in self._now() if fault.kind in kinds and read % fault.every == 0)

    def _of(self, kind: str) -> tuple[Fault, ...]:
        return tuple(fault for fault in self._now() if fault.kind == kind)

    def _now(self) -> tuple[Fault, ...]:
        if self._path is None:
            return ()
        try:
            status = self._path.stat()
        except OSError:
            self._faults, self._seen = (), None
            return ()
        found = (status.st_ino, status.st_mtime_ns, status.st_size)
        if found != self._seen:
            self._faults, self._seen = _read(self._path), found
        return self._faults


def parse_faults(document: Any) -> tuple[Fault, ...]:
    """Read the file's content.

    Raises:
        ConfigError: it is not of the form above; the text says where.
    """
    items = document.get("faults") if isinstance(document, Mapping) else None
    if not isinstance(items, list):
        raise ConfigError('faults: expected {"faults": [...]}')
    return tuple(_parse(item, index) for index, item in enumerate(items))


def _read(path: Path) -> tuple[Fault, ...]:
    try:
        faults = parse_faults(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ConfigError) as error:
        logger.warning("emulation.faults_unreadable file=%s error=%s: no faults", path, error)
        return ()
    logger.warning("emulation.faults file=%s %s", path, faults)
    return faults


def _parse(item: Any, index: int) -> Fault:
    kind = item.get("kind") if isinstance(item, Mapping) else None
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise ConfigError(f"faults[{index}].kind: expected one of {', '.join(_FIELDS)}, not {kind!r}")
    needed, optional = _FIELDS[kind]
    given = {name: value for name, value in item.items() if name != "kind"}
    if missing := [name for name in needed if name not in given]:
        raise ConfigError(f"faults[{index}]: {kind} needs {', '.join(missing)}")
    for name, value in given.items():
        if name not in (*needed, *optional):
            raise ConfigError(f"faults[{index}].{name}: {kind} has {', '.join((*needed, *optional))}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ConfigError(f"faults[{index}].{name}: expected a number of 0 or more, not {value!r}")
        if name == "every" and value < 1:
            raise ConfigError(f"faults[{index}].every: expected 1 or more, not {value!r}")
    return Fault(kind=kind, **given)
