"""What has been measured so far, on disk: a profiler that was interrupted goes on from there.

The first line says of which engine and under which settings; every other line is one measured cell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from vllm_disagg.core.steps import RecordedStep
from vllm_disagg.errors import ConfigError

FORMAT = "vllm-disagg-profile-journal"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One cell, measured once.

    Args:
        cell: its name.
        turn: the how manieth time it was measured.
        seconds: that this took.
        steps: that the engine took meanwhile.
    """

    cell: str
    turn: int
    seconds: float
    steps: tuple[RecordedStep, ...]


class Journal:
    """One file. A context manager that keeps it open for appending.

    Args:
        path: of it; made if it is not there.
        subject: engine and settings, as plain values by name, which have to be as they were.

    Attributes:
        entries: what was measured.
        known: what whoever began found out and the others go on with; None until it is known.

    Raises:
        ConfigError: the file is of something else, or no journal.
    """

    def __init__(self, path: Path, subject: Mapping[str, Any]) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self.known: dict[str, float] | None = None
        self._subject = dict(subject)
        self._file: TextIO | None = None
        lines = _lines(path)
        self._is_new = not lines
        if lines:
            self._check(_parsed(lines[0], f"{path}:1"))
        for number, line in enumerate(lines[1:], 2):
            self._take(_parsed(line, f"{path}:{number}"), f"{path}:{number}")

    @property
    def spent_s(self) -> float:
        """Seconds that measuring has taken so far."""
        return sum(entry.seconds for entry in self.entries)

    def __enter__(self) -> Self:
        try:
            self._cut_torn_line()
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error.strerror}") from error
        if self._is_new:
            self._write({"format": FORMAT, "version": VERSION, "subject": self._subject})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()

    def know(self, known: Mapping[str, float]) -> None:
        """Note what those who go on are to know."""
        self.known = dict(known)
        self._write({"known": self.known})

    def add(self, entry: Entry) -> None:
        """Note a cell; it is on disk when this returns."""
        self.entries.append(entry)
        steps = [[round(step.at_s, 6), round(step.step_s, 6), step.requests] for step in entry.steps]
        self._write({"cell": entry.cell, "turn": entry.turn, "seconds": round(entry.seconds, 3), "steps": steps})

    def _write(self, document: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(document, separators=(",", ":")) + "\n")
        self._file.flush()

    def _check(self, head: Mapping[str, Any]) -> None:
        theirs = head.get("subject")
        if head.get("format") != FORMAT or head.get("version") != VERSION or not isinstance(theirs, dict):
            raise ConfigError(f"{self.path} is not a profiler's journal of version {VERSION}: give another --out")
        ours = json.loads(json.dumps(self._subject))
        for name in sorted({*theirs, *ours}):
            if theirs.get(name) != ours.get(name):
                raise ConfigError(
                    f"{self.path} was begun with {name} {_shown(theirs.get(name))}, now it is "
                    f"{_shown(ours.get(name))}: start it as before, give another --out, or delete that file"
                )

    def _take(self, document: Mapping[str, Any], origin: str) -> None:
        try:
            if "known" in document:
                self.known = {name: float(value) for name, value in document["known"].items()}
            else:
                self.entries.append(_entry(document))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{origin} is not a line of a profiler's journal ({error!r}): give another --out, or delete that file"
            ) from error

    def _cut_torn_line(self) -> None:
        """What an interruption has left of a line."""
        if self.path.exists():
            content = self.path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                self.path.write_bytes(whole)


def _lines(path: Path) -> list[str]:
    """Whole ones; the last one may be torn."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if text and "\n" not in text:
        raise ConfigError(f"{path} is not a profiler's journal: give another --out")
    return text[: text.rfind("\n") + 1].splitlines()


def _parsed(line: str, origin: str) -> Mapping[str, Any]:
    try:
        document = json.loads(line)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise ConfigError(f"{origin} is not a line of a profiler's journal: {line[:60]!r}; give another --out")
    return document


def _entry(document: Mapping[str, Any]) -> Entry:
    return Entry(
        cell=str(document["cell"]),
        turn=int(document["turn"]),
        seconds=float(document["seconds"]),
        steps=tuple(
            RecordedStep(
                at_s=float(at_s),
                step_s=float(step_s),
                requests=tuple((int(computed), int(new)) for computed, new in requests),
            )
            for at_s, step_s, requests in document["steps"]
        ),
    )


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
