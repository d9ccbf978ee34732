"""`vllm-disagg profile`: an engine, cells, a journal, a fit, and a file."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import click

from vllm_disagg.core.steps import RecordedStep
from vllm_disagg.errors import ConfigError
from vllm_disagg.launcher.console import Console
from vllm_disagg.profiler.cells import Cell, Limits, Pace, Streams, cell_seconds, make_cells, pace_cell
from vllm_disagg.profiler.document import Result, entries_beside, fit_steps, profile_of, report, write_profile
from vllm_disagg.profiler.drive import EngineClient, connected, measure_pace, run_cell
from vllm_disagg.profiler.engine import Target, engine_to_measure
from vllm_disagg.profiler.facts import EngineFacts
from vllm_disagg.profiler.journal import Entry, Journal
from vllm_disagg.profiler.seen import steps_seen
from vllm_disagg.profiler.settings import ProfileSettings
from vllm_disagg.profiler.transfer import measure_transfer

MOST_TURNS: Final = 3
"""Every cell is measured at most so many times."""

PACE_SHARE: Final = 0.08
"""Of the time, that looking at the machine's pace may take."""

_PACE: Final = "pace: "
"""Before the name of its cell."""

_CAUTION: Final = 1.15
"""A cell is begun when so many times its expected length is left."""

Show = Callable[[float, str], None]
"""Share of the time that is spent, and what is going on."""


def run_profile(settings: ProfileSettings, console: Console | None = None) -> list[str]:
    """Measure, fit, write the profile, and return the lines to print.

    Raises:
        ConfigError, VllmUnavailable: a setting, a file or the engine is not as it would have to be.
        LaunchError: an engine of our own did not start.
        EngineTrouble: the engine failed; what was measured by then is kept.
    """
    console = console or Console()
    out = Path(settings.out)
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: name a file in it")
    journal = out.with_name(out.name + ".partial")
    try:
        result = asyncio.run(_measured(settings, out, journal, console))
    except KeyboardInterrupt:
        console.line(f"interrupted; the same command goes on from {journal}")
        raise
    beside = entries_beside(result.facts, out)
    write_profile(profile_of(result, command=_command(), beside=beside), out)
    journal.unlink()
    return [*report(result), f"wrote {out}"]


async def _measured(settings: ProfileSettings, out: Path, path: Path, console: Console) -> Result:
    async with engine_to_measure(settings, console) as target:
        entries_beside(target.facts, out)  # a file that cannot take the result is told before minutes are spent
        transfer = await asyncio.to_thread(_transfer, settings, target.facts)
        async with connected(target.url, target.served_name) as client:
            with Journal(path, subject_of(target)) as journal:
                await _measure(settings, target, client, journal, console)
    return fit_steps(
        target.facts,
        steps_by_cell(journal.entries),
        seconds=journal.spent_s,
        from_log=target.tail is not None,
        transfer=transfer,
    )


def _transfer(settings: ProfileSettings, facts: EngineFacts) -> dict[str, Any] | None:
    if settings.prefill is None or settings.decode is None:
        return None
    page = facts.model.kv_bytes_per_token * facts.block_size // facts.model.num_layers // facts.tp
    return measure_transfer(settings.prefill, settings.decode, key_file=settings.key_file, page_bytes=max(1, page))


def subject_of(target: Target) -> dict[str, Any]:
    """What has to be the same for a journal to be gone on with."""
    facts = target.facts
    return {
        "model": asdict(facts.model),
        "device": facts.device,
        "emulated": facts.emulated,
        "tensor-parallel size": facts.tp,
        "block size": facts.block_size,
        "max-num-batched-tokens": facts.step_tokens,
        "max-num-seqs": facts.max_seqs,
        "dtype": facts.dtype,
        "versions": facts.versions,
        "method": "steps" if target.tail is not None else "streams",
    }


def steps_by_cell(entries: Sequence[Entry]) -> Mapping[str, Sequence[Sequence[RecordedStep]]]:
    """For each cell the steps of each time that it was measured."""
    found: dict[str, list[Sequence[RecordedStep]]] = defaultdict(list)
    for entry in entries:
        found[entry.cell].append(entry.steps)
    return found


async def _measure(
    settings: ProfileSettings, target: Target, client: EngineClient, journal: Journal, console: Console
) -> None:
    """Cells until the time is over or all have had their turns."""
    budget_s = settings.budget_min * 60
    begun_s = time.monotonic()
    if journal.known is None:
        longest = min(target.facts.step_tokens, target.facts.model.max_model_len - 16)
        pace = await measure_pace(client, longest=longest, rng=random.Random(0))  # noqa: S311 - token ids, not secrets
        journal.know({**asdict(pace), "kv_tokens": target.facts.kv_capacity_tokens, "budget_s": budget_s})
    assert journal.known is not None
    known = journal.known
    pace, limits = Pace(token_s=known["token_s"], step_s=known["step_s"]), limits_of(target, int(known["kv_tokens"]))
    cells = make_cells(limits, pace, budget_s=known["budget_s"])
    before_s = journal.spent_s
    clock = _Clock(budget_s - before_s - (time.monotonic() - begun_s), pace, limits.fills_kv, journal.entries)
    done = {(entry.turn, entry.cell) for entry in journal.entries if not entry.cell.startswith(_PACE)}
    if journal.entries:
        console.line(f"going on from {journal.path}: {len(journal.entries)} cells, {before_s:.0f} s")
    looks = _Looks(pace_cell(limits), journal.entries)
    with _shown(console) as show:
        for turn in range(MOST_TURNS):
            for cell in _in_turn(cells, turn):
                if (turn, cell.name) in done or not clock.has_time_for(cell):
                    continue
                if looks.are_due():
                    entry = await _one(target, client, looks.cell, looks.number, pace, limits)
                    journal.add(replace(entry, cell=f"{_PACE}{entry.cell}"))
                    looks.took(entry.seconds)
                number = f"{len(done) + 1} of at most {MOST_TURNS * len(cells)}"
                show(1 - clock.left_s / budget_s, f"{number}: {cell.name}")
                entry = await _one(target, client, cell, turn, pace, limits)
                journal.add(entry)
                done.add((turn, cell.name))
                clock.took(cell, entry.seconds)
                looks.passed(entry.seconds)
        show(1.0, "")


def _in_turn(cells: Sequence[Cell], turn: int) -> list[Cell]:
    """Each time in another order: what was measured together at first is not so again, which tells the machine's pace
    from what cells cost."""
    order = list(cells)
    if turn > 0:
        random.Random(turn).shuffle(order)  # noqa: S311 - an order, not a secret
    return order


def limits_of(target: Target, kv_tokens: int) -> Limits:
    """What the engine can hold."""
    facts = target.facts
    return Limits(
        step_tokens=facts.step_tokens,
        max_seqs=facts.max_seqs,
        max_model_len=facts.model.max_model_len,
        kv_tokens=kv_tokens,
        fills_kv=facts.fills_kv and target.tail is not None,
        sees_steps=target.tail is not None,
    )


async def _one(target: Target, client: EngineClient, cell: Cell, turn: int, pace: Pace, limits: Limits) -> Entry:
    begun_s = time.monotonic()
    if target.tail is not None:
        target.tail.new()
    rng = random.Random(f"{cell.name} {turn}")  # noqa: S311 - token ids, not secrets
    seen = await run_cell(client, cell, pace=pace, limits=limits, rng=rng)
    steps = steps_seen(seen) if target.tail is None else target.tail.new()[1:]  # the first one woke the engine up
    return Entry(cell=cell.name, turn=turn, seconds=time.monotonic() - begun_s, steps=tuple(steps))


class _Clock:
    """How much time is left, and for what it suffices."""

    def __init__(self, left_s: float, pace: Pace, fills_kv: bool, entries: Sequence[Entry]) -> None:
        self._end_s = time.monotonic() + left_s
        self._pace, self._fills_kv = pace, fills_kv
        self._took = {entry.cell: entry.seconds for entry in entries}
        self._expected_s = self._real_s = 0.0

    @property
    def left_s(self) -> float:
        return max(0.0, self._end_s - time.monotonic())

    def has_time_for(self, cell: Cell) -> bool:
        known = self._took.get(cell.name)
        factor = max(1.0, self._real_s / self._expected_s) if self._expected_s else 1.0
        expected = self._expected(cell) * factor if known is None else known
        return expected * _CAUTION <= self.left_s

    def took(self, cell: Cell, seconds: float) -> None:
        self._took[cell.name] = seconds
        self._expected_s += self._expected(cell)
        self._real_s += seconds

    def _expected(self, cell: Cell) -> float:
        return cell_seconds(cell, self._pace, fills_kv=self._fills_kv)


class _Looks:
    """When the machine's pace is looked at again: as often as `PACE_SHARE` of the time allows.

    Attributes:
        cell: what is measured for it.
        number: of the next look.
    """

    def __init__(self, cell: Streams, entries: Sequence[Entry]) -> None:
        self.cell = cell
        self.number = sum(entry.cell.startswith(_PACE) for entry in entries)
        self._since_s = self._took_s = 0.0

    def are_due(self) -> bool:
        return self._took_s <= PACE_SHARE * self._since_s

    def took(self, seconds: float) -> None:
        """There was a look."""
        self.number += 1
        self._since_s, self._took_s = 0.0, seconds

    def passed(self, seconds: float) -> None:
        """Something else was measured."""
        self._since_s += seconds


@contextlib.contextmanager
def _shown(console: Console) -> Iterator[Show]:
    """A bar on a terminal, a line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield lambda share, what: console.status(f"{share:4.0%} of the time  {what}")
        return
    with click.progressbar(length=1000, label="profiling", file=sys.stderr, item_show_func=lambda what: what) as bar:

        def show(share: float, what: str) -> None:
            bar.update(max(0, min(1000, round(1000 * share)) - bar.pos), what)

        yield show


def _command() -> str:
    return shlex.join(["vllm-disagg", *sys.argv[1:]])
