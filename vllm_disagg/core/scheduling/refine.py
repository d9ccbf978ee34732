"""Learns how long an engine's steps take from the steps it takes.

With a profile, what was measured corrects it: one factor for each kind of step, measured over expected (as NVIDIA
Dynamo's planner corrects its profiles). Without one, the coefficients of each kind are fitted to the steps themselves,
by least squares of the relative error, as DistServe fits its own (`evaluation/1-fit-time-usage` there).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal

from vllm_disagg.core.latency import LatencyModel, Regime, StepWork

Kind = Literal["prefill", "decode", "mixed"]
KINDS: Final[tuple[Kind, ...]] = ("prefill", "decode", "mixed")

MIN_STEPS: Final = 32
"""Steps of a kind before what was measured counts."""

_WINDOW: Final = 101
"""Steps of a kind whose median ratio is its correction."""

_FORGET: Final = 0.999
_RIDGE: Final = 1e-3

_TERMS: Final[dict[Kind, tuple[str, ...]]] = {
    "prefill": ("constant", "tokens", "area"),
    "decode": ("constant", "decodes", "context"),
    "mixed": ("constant", "tokens", "area", "decodes", "context"),
}
_SCALE: Final = {"constant": 1.0, "tokens": 1e3, "area": 1e6, "decodes": 1e2, "context": 1e5}
"""So that all columns are of one magnitude."""

_REGIME_FIELDS: Final = {
    "constant": "constant_s",
    "tokens": "per_token_s",
    "area": "per_area_s",
    "decodes": "per_decode_s",
    "context": "per_context_s",
}


def kind_of(work: StepWork) -> Kind | None:
    """What a step computes; None for an empty one."""
    if work.num_prefills:
        return "mixed" if work.num_decodes else "prefill"
    return "decode" if work.num_decodes else None


class StepTimes:
    """Takes steps in, and gives the latency model that they speak for.

    Args:
        profile: what is believed before anything was measured; None to begin with nothing.
    """

    def __init__(self, profile: LatencyModel | None = None) -> None:
        self._profile = profile
        self._ratios: dict[Kind, deque[float]] = {kind: deque(maxlen=_WINDOW) for kind in KINDS}
        self._fits: dict[Kind, _Fit] = {kind: _Fit(len(_TERMS[kind])) for kind in KINDS}
        self._counts: dict[Kind, int] = dict.fromkeys(KINDS, 0)

    def add(self, work: StepWork, step_s: float) -> None:
        """One step, and how long it took. Empty steps and times that are not positive are left out."""
        kind = kind_of(work)
        if kind is None or not 0 < step_s < float("inf"):
            return
        self._counts[kind] += 1
        if self._profile is not None:
            expected_s = self._profile.step_s(work)
            if expected_s > 0:
                self._ratios[kind].append(step_s / expected_s)
        else:
            self._fits[kind].add([_feature(work, term) for term in _TERMS[kind]], step_s)

    @property
    def has_profile(self) -> bool:
        """Whether there was something to begin with."""
        return self._profile is not None

    def count(self, kind: Kind) -> int:
        """Steps of this kind so far."""
        return self._counts[kind]

    def model(self) -> LatencyModel | None:
        """What is known now; None as long as that is too little to say how long steps with prompts take."""
        if self._profile is not None:
            return self._corrected(self._profile)
        prefill = self._fitted("prefill") or self._fitted("mixed")
        if prefill is None:
            return None
        mixed = self._fitted("mixed")
        decode = self._fitted("decode") or replace(prefill, per_token_s=0.0, per_area_s=0.0)
        return LatencyModel(prefill=(prefill,), decode=(decode,), mixed=(mixed,) if mixed else ())

    def _corrected(self, profile: LatencyModel) -> LatencyModel:
        factor = {kind: self._correction(kind) for kind in KINDS}
        prefill = _nearest(factor, ("prefill", "mixed", "decode"))
        decode = _nearest(factor, ("decode", "mixed", "prefill"))
        mixed = _nearest(factor, ("mixed", "prefill", "decode"))
        own_mixed = profile.mixed or ()
        if not own_mixed and factor["mixed"] is not None and abs(mixed / prefill - 1) > 0.05:
            own_mixed = tuple(  # the profile has none: what it would reckon, with a factor of its own
                replace(regime, per_decode_s=regime.per_token_s, per_context_s=profile.decode[-1].per_context_s)
                for regime in profile.prefill
            )
        return LatencyModel(
            prefill=tuple(_times(regime, prefill) for regime in profile.prefill),
            decode=tuple(_times(regime, decode) for regime in profile.decode),
            mixed=tuple(_times(regime, mixed) for regime in own_mixed),
        )

    def _correction(self, kind: Kind) -> float | None:
        ratios = self._ratios[kind]
        return sorted(ratios)[len(ratios) // 2] if len(ratios) >= MIN_STEPS else None

    def _fitted(self, kind: Kind) -> Regime | None:
        if self._counts[kind] < MIN_STEPS:
            return None
        found = self._fits[kind].solve()
        if found is None:
            return None
        values = {_REGIME_FIELDS[term]: value / _SCALE[term] for term, value in zip(_TERMS[kind], found, strict=True)}
        return Regime(**values)


def _feature(work: StepWork, term: str) -> float:
    value = {
        "constant": 1.0,
        "tokens": float(work.prefill_tokens),
        "area": float(work.prefill_area),
        "decodes": float(work.num_decodes),
        "context": float(work.decode_context),
    }[term]
    return value / _SCALE[term]


def _nearest(factor: dict[Kind, float | None], kinds: Sequence[Kind]) -> float:
    return next((found for kind in kinds if (found := factor[kind]) is not None), 1.0)


def _times(regime: Regime, factor: float) -> Regime:
    return Regime(
        up_to=regime.up_to,
        constant_s=regime.constant_s * factor,
        per_token_s=regime.per_token_s * factor,
        per_area_s=regime.per_area_s * factor,
        per_prefill_s=regime.per_prefill_s * factor,
        per_decode_s=regime.per_decode_s * factor,
        per_context_s=regime.per_context_s * factor,
    )


class _Fit:
    """Least squares of the relative error that forgets slowly, with coefficients that are not negative."""

    def __init__(self, size: int) -> None:
        self._normal = [[0.0] * size for _ in range(size)]
        self._right = [0.0] * size
        self._weight = 0.0

    def add(self, features: Sequence[float], step_s: float) -> None:
        row = [feature / step_s for feature in features]
        self._weight = self._weight * _FORGET + 1.0
        for i, left in enumerate(row):
            self._right[i] = self._right[i] * _FORGET + left
            line = self._normal[i]
            for j, right in enumerate(row):
                line[j] = line[j] * _FORGET + left * right

    def solve(self) -> list[float] | None:
        """The coefficients; those that would be negative are 0, and the others fitted without them."""
        active = list(range(len(self._right)))
        while active:
            found = self._solve(active)
            if found is None:
                return None
            worst = min(range(len(active)), key=lambda place: found[place])
            if found[worst] >= 0:
                result = [0.0] * len(self._right)
                for place, value in zip(active, found, strict=True):
                    result[place] = value
                return result
            del active[worst]
        return None

    def _solve(self, active: Sequence[int]) -> list[float] | None:
        """Gaussian elimination with pivots; a little of each diagonal is added, for columns that hardly vary."""
        size = len(active)
        rows = [[self._normal[i][j] for j in active] + [self._right[i]] for i in active]
        for place in range(size):
            rows[place][place] *= 1 + _RIDGE * 1e-3
        for column in range(size):
            pivot = max(range(column, size), key=lambda line: abs(rows[line][column]))
            if abs(rows[pivot][column]) < 1e-18:
                return None
            rows[column], rows[pivot] = rows[pivot], rows[column]
            for line in range(column + 1, size):
                factor = rows[line][column] / rows[column][column]
                for j in range(column, size + 1):
                    rows[line][j] -= factor * rows[column][j]
        found = [0.0] * size
        for line in reversed(range(size)):
            rest = sum(rows[line][j] * found[j] for j in range(line + 1, size))
            found[line] = (rows[line][size] - rest) / rows[line][line]
        return found
