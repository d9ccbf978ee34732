"""Has the workload changed so much that the plan should be made again? Pure functions over what was observed.

A mean is watched by a two-sided Page-Hinkley (CUSUM) test on logarithms, which are nearly symmetric where lengths and
gaps are skewed. Its two numbers have a meaning: a shift of `shift` (0.3: by 30 %) is looked for, and a stream that does
not change raises a false alarm once in about `false_alarm_every` observations.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from vllm_disagg.errors import ConfigError
from vllm_disagg.planner.goodput import half_width
from vllm_disagg.planner.placement import Mapper, Question, Score, measure
from vllm_disagg.planner.plan import Gain, Plan, make_plan
from vllm_disagg.sim.workload import Floats, Ints, Workload

Signal = Literal["prompt length", "output length", "rate"]

SIGNALS: Final[tuple[Signal, ...]] = ("prompt length", "output length", "rate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What counts as drift.

    Args:
        shift: relative change of a mean that should be noticed.
        false_alarm_every: observations between two alarms of a stream that has not changed, about.
    """

    shift: float = 0.3
    false_alarm_every: float = 100_000.0

    def __post_init__(self) -> None:
        if not (self.shift > 0 and math.isfinite(self.shift)):
            raise ConfigError(f"the shift to notice must be a positive number, not {self.shift!r}")
        if not self.false_alarm_every > 1:
            raise ConfigError(f"false alarms must be more than one observation apart, not {self.false_alarm_every!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The logarithms of what the plan was made for: mean and standard deviation of each signal."""

    mean: dict[Signal, float]
    deviation: dict[Signal, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """The state of the detector: two sums for each signal. Feed it with `observe`; it is a value.

    Args:
        baseline: what counts as normal.
        sensitivity: what counts as drift.
        up, down: evidence that a signal has risen or fallen, in standard deviations.
        last_arrival_s: of the latest request.
    """

    baseline: Baseline
    sensitivity: Sensitivity
    up: dict[Signal, float]
    down: dict[Signal, float]
    last_arrival_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """A signal has left its baseline."""

    signal: Signal
    rose: bool


def baseline_of(workload: Workload) -> Baseline:
    """What is normal, from the requests that a plan was made with.

    Raises:
        ConfigError: there are fewer than 10 requests.
    """
    if len(workload) < 10:
        raise ConfigError(f"a baseline needs at least 10 requests, not {len(workload)}")
    samples = _samples(workload.prompt_tokens, workload.output_tokens, np.diff(workload.arrival_s))
    return Baseline(
        mean={signal: float(values.mean()) for signal, values in samples.items()},
        deviation={signal: max(float(values.std()), 1e-3) for signal, values in samples.items()},
    )


def start_watch(baseline: Baseline, sensitivity: Sensitivity | None = None) -> Watch:
    """A detector that has seen nothing yet."""
    zero: dict[Signal, float] = dict.fromkeys(SIGNALS, 0.0)
    return Watch(baseline=baseline, sensitivity=sensitivity or Sensitivity(), up=zero, down=dict(zero))


def observe(watch: Watch, *, arrival_s: float, prompt_tokens: int, output_tokens: int) -> tuple[Watch, Drift | None]:
    """Take one finished request in.

    Returns:
        The next state and, if there is, the first signal that has drifted. After an alarm begin anew with a baseline.
    """
    seen: dict[Signal, float] = {
        "prompt length": math.log(max(prompt_tokens, 1)),
        "output length": math.log(max(output_tokens, 1)),
    }
    if watch.last_arrival_s is not None:
        seen["rate"] = -math.log(max(arrival_s - watch.last_arrival_s, 1e-9))
    up, down, drift = dict(watch.up), dict(watch.down), None
    for signal, value in seen.items():
        deviation = watch.baseline.deviation[signal]
        step = math.log1p(watch.sensitivity.shift) / deviation  # the shift in standard deviations
        z = (value - watch.baseline.mean[signal]) / deviation
        up[signal] = max(0.0, up[signal] + z - step / 2)
        down[signal] = max(0.0, down[signal] - z - step / 2)
        limit = threshold(step, watch.sensitivity.false_alarm_every)
        if drift is None and max(up[signal], down[signal]) > limit:
            drift = Drift(signal=signal, rose=up[signal] > down[signal])
    return replace(watch, up=up, down=down, last_arrival_s=arrival_s), drift


@functools.cache
def threshold(step: float, false_alarm_every: float) -> float:
    """The evidence at which to raise the alarm, so that unchanged normal data do it once in `false_alarm_every`
    observations on the whole, over two sides and three signals. Siegmund's approximation of a CUSUM's average run
    length: (exp(2 k b) - 2 k b - 1) / (2 k^2) with k = step / 2, b = threshold + 1.166."""
    k = step / 2
    wanted = false_alarm_every * 2 * len(SIGNALS)
    low, high = 0.0, 10.0
    while _run_length(k, high) < wanted:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _run_length(k, middle) < wanted else (low, middle)
    return high


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveCost:
    """What it takes to change a deployment.

    Args:
        reload_s: an instance serves nothing while it loads its weights.
        horizon_s: how long the new plan will be used, at least.
    """

    reload_s: float = 120.0
    horizon_s: float = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Replan:
    """Whether to change.

    Args:
        action: `keep` or `move`.
        plan: the best plan for the recent requests.
        gain: goodput per price of that plan over the old placement's, on the recent requests; None where the old one
            cannot meet the targets at all any more.
        reason: one sentence.
    """

    action: Literal["keep", "move"]
    plan: Plan
    gain: Gain | None
    reason: str


def replan(old: Plan, question: Question, cost: MoveCost | None = None, mapper: Mapper = map) -> Replan:
    """Plan anew for recent requests, and say whether the change pays.

    Args:
        old: what runs now.
        question: with the recent requests as its workloads.
        cost: of changing.
        mapper: as for `make_plan`.

    Raises:
        NoFeasiblePlacement: nothing meets the targets with the recent requests.
    """
    cost = cost or MoveCost()
    plan = make_plan(question, mapper)
    if plan.chosen.candidate == old.chosen.candidate:
        return Replan(
            action="keep", plan=plan, gain=Gain(ratio=1.0, half_width=0.0), reason="keep: it is still the best"
        )
    (now,) = measure(question, [_unscored(old.chosen)], mapper)
    if now.goodput.mean == 0:
        return Replan(
            action="move", plan=plan, gain=None, reason="move: what runs now cannot meet the targets any more"
        )
    ratios = _ratios(plan.chosen, now)
    gain = Gain(ratio=sum(ratios) / len(ratios), half_width=half_width(ratios))
    lost = cost.reload_s / cost.horizon_s
    if gain.ratio - gain.half_width > 1 + lost:
        reason = f"move: {gain.ratio:.2f}x the goodput, more than the {lost:.0%} that reloading costs"
        return Replan(action="move", plan=plan, gain=gain, reason=reason)
    reason = (
        f"keep: {gain.ratio:.2f}x ± {gain.half_width:.2f} does not clearly pay for the {lost:.0%} that reloading costs"
    )
    return Replan(action="keep", plan=plan, gain=gain, reason=reason)


def _unscored(score: Score) -> Score:
    return replace(score, goodput=replace(score.goodput, per_seed=(0.0,)))


def _ratios(new: Score, now: Score) -> list[float]:
    pairs = zip(new.goodput.per_seed, now.goodput.per_seed, strict=True)
    return [(ours / new.price) / (theirs / now.price) for ours, theirs in pairs if theirs > 0] or [1.0]


def _samples(prompt: Ints, output: Ints, gaps: Floats) -> dict[Signal, Floats]:
    return {
        "prompt length": np.log(np.maximum(prompt, 1)),
        "output length": np.log(np.maximum(output, 1)),
        "rate": -np.log(np.maximum(gaps, 1e-9)),
    }


def _run_length(k: float, limit: float) -> float:
    x = 2 * k * (limit + 1.166)
    return (math.exp(min(x, 700.0)) - x - 1) / (2 * k * k)
