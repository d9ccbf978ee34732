"""What is measured: batches of prompts, and groups of streams that decode beside prompts. A pure function from what an
engine can hold, and what its time costs, to a list of cells."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

LONGEST_GROWTH: Final = 320
"""Tokens that a stream may add to its context while its cell is measured."""

STEPS_PER_RUNG: Final = 5
SETTLING_STEPS: Final = 2
"""Tokens of each stream after a change of the batch, which are not looked at."""

_SHORTEST: Final = 16
_BATCHES: Final = (1, 2, 4, 8, 16)
_RAGGED_BATCHES: Final = 14
_MOST_STREAMS: Final = 256
_MOST_WATCHED_STREAMS: Final = 64
"""Where a client has to notice each token, which costs the API server more than the engine."""

_RUNG_RATIO: Final = 1.6
_PROMPTS_PER_RUNG: Final = 2
_CELL_SHARE: Final = 0.06
"""Of the budget, that the prompts before one group of streams may take."""

_KV_SHARE: Final = 0.9
_PACE_STREAMS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an engine can hold.

    Args:
        step_tokens: most new tokens of a step.
        max_seqs: most requests of a step.
        max_model_len: longest context, tokens.
        kv_tokens: tokens whose KV fits.
        fills_kv: contexts of streams need not be computed.
        sees_steps: steps are read off a log, so that one prompt may take several of them.
    """

    step_tokens: int
    max_seqs: int
    max_model_len: int
    kv_tokens: int
    fills_kv: bool = False
    sees_steps: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """About how fast the engine is, to choose cells and to tell how long they will take.

    Args:
        token_s: seconds per token of a long prompt.
        step_s: seconds of a step that decodes one request.
    """

    token_s: float
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts that are computed in one step.

    Args:
        lengths: of each, tokens.
        repeats: how often.
    """

    lengths: tuple[int, ...]
    repeats: int = 1

    @property
    def name(self) -> str:
        """Different for different cells."""
        return f"prompts {_counted(self.lengths)}"

    def seconds(self, pace: Pace) -> float:
        """About how long it takes."""
        return self.repeats * (2 * pace.step_s + sum(self.lengths) * pace.token_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """Part of a group of streams: so many of them, and prompts that are sent beside them, one batch after the other."""

    num_streams: int
    prompts: tuple[tuple[int, ...], ...] = ()

    @property
    def num_steps(self) -> int:
        """About how many it takes."""
        return SETTLING_STEPS + STEPS_PER_RUNG + 3 * len(self.prompts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """Requests that decode together, fewer and fewer of them.

    Args:
        contexts: of each stream at its beginning, tokens; those that stay longest come first.
        rungs: with falling numbers of streams.
    """

    contexts: tuple[int, ...]
    rungs: tuple[Rung, ...]

    @property
    def name(self) -> str:
        """Different for different cells."""
        return f"streams {_counted(self.contexts)}"

    def seconds(self, pace: Pace, *, fills_kv: bool) -> float:
        """About how long it takes."""
        setup = len(self.contexts) if fills_kv else sum(self.contexts)
        beside = sum(sum(lengths) for rung in self.rungs for lengths in rung.prompts)
        steps = sum(
            (STEPS_PER_RUNG + SETTLING_STEPS + 2 * len(rung.prompts)) * (pace.step_s + rung.num_streams * pace.token_s)
            for rung in self.rungs
        )
        return setup * pace.token_s + beside * pace.token_s + steps


Cell = Prompts | Streams


def make_cells(limits: Limits, pace: Pace, *, budget_s: float, seed: int = 1) -> list[Cell]:
    """Everything that is to be measured once, in an order that covers all kinds early.

    Args:
        limits: what the engine can hold.
        pace: what its time costs.
        budget_s: for all of it.
        seed: of the random lengths and of the order.
    """
    rng = random.Random(seed)  # noqa: S311 - lengths, not secrets
    longest = _longest_prompt(limits, pace, budget_s)
    cells: list[Cell] = [*_equal_prompts(limits, longest, pace, budget_s), *_ragged_prompts(limits, longest, rng)]
    cells += _long_prompts(limits, pace, budget_s)
    groups: list[Cell] = list(_groups(limits, pace, budget_s, rng))
    rng.shuffle(cells)
    return _interleaved(cells, groups)


def pace_cell(limits: Limits) -> Streams:
    """What is measured again and again between the others: few short streams, by which the machine's pace is known at
    all times."""
    number = min(_PACE_STREAMS, limits.max_seqs)
    return Streams(contexts=(_SHORTEST,) * number, rungs=(Rung(num_streams=number),))


def cell_seconds(cell: Cell, pace: Pace, *, fills_kv: bool) -> float:
    """About how long a cell takes."""
    return cell.seconds(pace) if isinstance(cell, Prompts) else cell.seconds(pace, fills_kv=fills_kv)


def _longest_prompt(limits: Limits, pace: Pace, budget_s: float) -> int:
    """Most tokens of a batch of prompts."""
    affordable = int(_CELL_SHARE * budget_s / pace.token_s)
    return max(2 * _SHORTEST, min(limits.step_tokens, limits.max_model_len - 1, affordable))


def _equal_prompts(limits: Limits, longest: int, pace: Pace, budget_s: float) -> Iterable[Prompts]:
    for length in _levels(_SHORTEST, longest, 2.0):
        for batch in _BATCHES:
            total = batch * length
            if batch <= limits.max_seqs and total <= longest and (batch <= 4 or length <= 128):
                cheap = total * pace.token_s < budget_s / 400
                yield Prompts(lengths=(length,) * batch, repeats=2 if cheap else 1)


def _ragged_prompts(limits: Limits, longest: int, rng: random.Random) -> Iterable[Prompts]:
    if limits.max_seqs < 2:
        return
    for _ in range(_RAGGED_BATCHES):
        total = _log_uniform(rng, 4 * _SHORTEST, longest)
        number = rng.randint(2, min(8, limits.max_seqs, total // 8))
        yield Prompts(lengths=_parts(rng, total, number))


def _long_prompts(limits: Limits, pace: Pace, budget_s: float) -> Iterable[Prompts]:
    """Prompts that take several steps, each of which reads what the earlier ones have left."""
    if not limits.sees_steps:
        return
    length = 2 * limits.step_tokens
    while length < min(limits.max_model_len, limits.kv_tokens) and length * pace.token_s <= budget_s * _CELL_SHARE:
        yield Prompts(lengths=(length,))
        length *= 2


def _groups(limits: Limits, pace: Pace, budget_s: float, rng: random.Random) -> Iterable[Streams]:
    """Streams with short, longer and long contexts, and with contexts of every length."""
    most = limits.max_model_len - LONGEST_GROWTH
    affordable = _CELL_SHARE * budget_s / pace.token_s
    highest = min(most, limits.kv_tokens // 2) if limits.fills_kv else min(most, limits.kv_tokens // 2, affordable)
    for context in _levels(_SHORTEST, max(_SHORTEST, int(highest)), 4.0):
        number = _num_streams(limits, context, affordable, pace, budget_s)
        yield _group((context,) * number, limits, pace, budget_s, rng)
    low, high = _SHORTEST, max(2 * _SHORTEST, int(highest))
    number = _num_streams(limits, round((high - low) / math.log(high / low)), affordable, pace, budget_s)
    for _ in range(2):
        contexts = [_log_uniform(rng, low, high) for _ in range(number)]
        while len(contexts) > 1 and sum(contexts) > _KV_SHARE * limits.kv_tokens - len(contexts) * LONGEST_GROWTH // 3:
            contexts.pop()
        yield _group(contexts, limits, pace, budget_s, rng)


def _num_streams(limits: Limits, context: int, affordable: float, pace: Pace, budget_s: float) -> int:
    room = int(_KV_SHARE * limits.kv_tokens) // (context + LONGEST_GROWTH // 3)
    number = min(_MOST_STREAMS if limits.sees_steps else _MOST_WATCHED_STREAMS, limits.max_seqs, max(1, room))
    if not limits.fills_kv:
        number = min(number, max(1, int(affordable / context)))
    rung = Rung(num_streams=1, prompts=((),) * _PROMPTS_PER_RUNG)
    steps_s = rung.num_steps * pace.token_s * _RUNG_RATIO / (_RUNG_RATIO - 1)  # of a stream more, over all rungs
    return max(1, min(number, int(_CELL_SHARE * budget_s / steps_s)))


def _group(contexts: Sequence[int], limits: Limits, pace: Pace, budget_s: float, rng: random.Random) -> Streams:
    longest = min(limits.step_tokens - len(contexts), limits.max_model_len - 1, int(budget_s / 200 / pace.token_s))
    room = limits.max_seqs - len(contexts)
    return Streams(
        contexts=tuple(contexts),
        rungs=tuple(
            Rung(num_streams=number, prompts=_beside(longest, room + len(contexts) - number, rng))
            for number in _rungs(len(contexts))
        ),
    )


def _beside(longest: int, room: int, rng: random.Random) -> tuple[tuple[int, ...], ...]:
    if longest < 4 * _SHORTEST or room < 1:
        return ()
    found = []
    for _ in range(_PROMPTS_PER_RUNG):
        total = _log_uniform(rng, _SHORTEST, longest)
        found.append(_parts(rng, total, rng.randint(1, max(1, min(3, room, total // 16)))))
    return tuple(found)


def _rungs(number: int) -> list[int]:
    found = [number]
    while found[-1] > 1:
        found.append(min(found[-1] - 1, math.floor(found[-1] / _RUNG_RATIO)))
    return [rung for rung in found if rung >= 1]


def _levels(low: int, high: int, ratio: float) -> list[int]:
    """From `low` to `high`, both included."""
    found = []
    level = float(low)
    while level < high / math.sqrt(ratio):
        found.append(round(level))
        level *= ratio
    return [*found, high]


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return max(low, round(math.exp(rng.uniform(math.log(low), math.log(max(low, high))))))


def _parts(rng: random.Random, total: int, number: int) -> tuple[int, ...]:
    """`total`, or a little less, in so many parts of different size, each at least 2."""
    weights = [rng.expovariate(1.0) + 0.05 for _ in range(number)]
    parts = sorted((max(2, int(total * weight / sum(weights))) for weight in weights), reverse=True)
    parts[0] = max(2, parts[0] - max(0, sum(parts) - total))
    return tuple(parts)


def _interleaved(cells: Sequence[Cell], groups: Sequence[Cell]) -> list[Cell]:
    """Groups spread evenly among the other cells, the first one early."""
    found: list[Cell] = list(cells)
    every = max(1, len(cells) // max(1, len(groups)))
    for index, group in enumerate(groups):
        found.insert(min(len(found), index * (every + 1) + every // 2), group)
    return found


def _counted(lengths: Sequence[int]) -> str:
    """Such as `16x4` or `300+20+16x2`."""
    counts = {length: lengths.count(length) for length in dict.fromkeys(lengths)}
    if len(counts) > 12:
        return f"{min(lengths)}-{max(lengths)}x{len(lengths)}#{sum(lengths)}"
    return "+".join(f"{length}x{count}" if count > 1 else str(length) for length, count in counts.items())
