"""What comes of a measurement: a profile, and how it was made."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from vllm_disagg.core.latency import StepWork
from vllm_disagg.core.profile import Kind, ParallelEntry, Profile, parse_profile, profile_document
from vllm_disagg.core.scheduling.pace import critical_length
from vllm_disagg.core.steps import RecordedStep, cycles_s
from vllm_disagg.errors import ConfigError
from vllm_disagg.planner.fit import REGIONS, Fit, fit_latency, judge
from vllm_disagg.profiler.facts import EngineFacts
from vllm_disagg.profiler.machine import Drift, at_mean_pace
from vllm_disagg.profiler.points import Measured, measured, spreads

_RANGES: Final[dict[str, Callable[[StepWork], int]]] = {
    "prefill_tokens": lambda work: work.prefill_tokens,
    "num_decodes": lambda work: work.num_decodes,
    "context_per_decode": lambda work: work.decode_context // max(1, work.num_decodes),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A fitted measurement.

    Args:
        facts: of the engine.
        fit: of its steps, each at the pace that the machine had on average.
        as_measured: of its steps as they were; the same where the pace did not move.
        drift: of the pace.
        points: that were fitted.
        between_steps_s: the host's time from one step to the next; None where steps contain it.
        seconds: that measuring took.
        method: `steps` read off a log, or told from `streams`.
        transfer: how KV travels, where a pair was given.
    """

    facts: EngineFacts
    fit: Fit
    as_measured: Fit
    drift: Drift
    points: Sequence[Measured]
    between_steps_s: float | None
    seconds: float
    method: str
    transfer: Mapping[str, Any] | None = None

    @property
    def l_m_tokens(self) -> int:
        """L_m of the fitted step times."""
        return critical_length(self.fit.latency, longest=self.facts.step_tokens)


def fit_steps(
    facts: EngineFacts,
    steps: Mapping[str, Sequence[Sequence[RecordedStep]]],
    *,
    seconds: float,
    from_log: bool,
    transfer: Mapping[str, Any] | None = None,
) -> Result:
    """Fit what was measured.

    Args:
        facts: of the engine.
        steps: of each cell by its name, for each time that it was measured.
        seconds: that this took.
        from_log: they were read off a log, without the host's time between them.
        transfer: how KV travels, where that was measured as well.

    Raises:
        ConfigError: there are too few.
    """
    steady, drift = at_mean_pace(steps)
    points = measured(steady)
    try:
        fit = fit_latency([item.point for item in points])
        as_measured = fit if drift.is_none else fit_latency([item.point for item in measured(steps)])
    except ConfigError as error:
        raise ConfigError(f"{error}: give the measurement more time with --budget-min") from error
    runs = [run for runs in steps.values() for run in runs]
    pauses = [cycle_s - step.step_s for run in runs for step, cycle_s in cycles_s(run)] if from_log else []
    return Result(
        facts=facts,
        fit=fit,
        as_measured=as_measured,
        drift=drift,
        points=points,
        between_steps_s=max(0.0, statistics.median(pauses)) if pauses else None,
        seconds=seconds,
        method="steps" if from_log else "streams",
        transfer=transfer,
    )


def profile_of(result: Result, *, command: str, beside: Mapping[int, ParallelEntry] | None = None) -> Profile:
    """The profile.

    Args:
        result: of one tensor-parallel degree.
        command: that it was measured with.
        beside: the other degrees.
    """
    facts = result.facts
    entry = ParallelEntry(
        tp=facts.tp,
        latency=result.fit.latency,
        kv_capacity_tokens={1: facts.kv_capacity_tokens},
        residuals=result.fit.residuals,
        measurement=_measurement(result, command),
    )
    of = f"the emulated device {facts.emulated}" if facts.emulated else facts.device
    return Profile(
        model=facts.model,
        device=facts.device,
        device_memory_bytes=facts.device_memory_bytes,
        kind=_kind(facts),
        source=f"vllm-disagg profile on {of}, {time.strftime('%Y-%m-%d')}, "
        + ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        entries={**(beside or {}), facts.tp: entry},
    )


def entries_beside(facts: EngineFacts, path: Path) -> Mapping[int, ParallelEntry]:
    """The tensor-parallel degrees that a file already has, which the new one is added to; none without a file.

    Raises:
        ConfigError: the file is not a profile of the same model on the same device.
    """
    if not path.exists():
        return {}
    try:
        other = parse_profile(json.loads(path.read_text(encoding="utf-8")), origin=str(path))
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(f"{path} exists and is not a profile ({error}): give another --out") from error
    ours = {"device": facts.device, "kind": _kind(facts)}
    for name, value in ours.items():
        if getattr(other, name) != value:
            raise ConfigError(
                f"{path} is a profile with {name} {getattr(other, name)!r}, this engine's is {value!r}: "
                "give another --out"
            )
    if replace(other.model, max_model_len=1) != replace(facts.model, max_model_len=1):
        raise ConfigError(
            f"{path} is a profile of {other.model.name}, or of another shape of it than this engine's "
            f"{facts.model.name}: give another --out"
        )
    return other.entries


def _kind(facts: EngineFacts) -> Kind:
    return "guess" if facts.emulated else "measured"


def write_profile(profile: Profile, path: Path) -> None:
    """Write it; whoever reads sees all of it or the file as it was.

    Raises:
        ConfigError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        draft.write_text(json.dumps(profile_document(profile), indent=1) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def report(result: Result) -> list[str]:
    """What to tell of it."""
    fit, spread = result.fit, spreads(result.points)
    lines = [f"{'steps':<24}{'points':>7}{'off by':>9}{'p90':>8}{'worst':>8}{'differ by':>11}"]
    rows = [(region, fit.errors[region], spread.get(region)) for region in REGIONS if region in fit.errors]
    for name, error, own in rows:
        lines.append(
            f"{name:<24}{error.num_points:>7}{error.median:>9.1%}{error.p90:>8.1%}{error.worst:>8.1%}"
            + ("          -" if own is None else f"{own:>11.1%}")
        )
    if (ragged := fit.mixed_lengths) is not None:
        label = "prefill, mixed lengths"
        lines.append(
            f"{label:<24}{ragged.num_points:>7}{ragged.median:>9.1%}{ragged.p90:>8.1%}{ragged.worst:>8.1%}          -"
        )
    lines.append("off by: held-out points against the fit, at the median; differ by: equal steps among themselves")
    if not result.drift.is_none:
        raw = ", ".join(f"{region} {error.median:.1%}" for region, error in result.as_measured.errors.items())
        lines.append(
            f"the machine's pace moved from {result.drift.fast:.0%} to {result.drift.slow:.0%} of a step's mean time; "
            f"the table is without that, and with it points are off by: {raw}"
        )
    lines.append(
        f"L_m {result.l_m_tokens} tokens; KV {result.facts.kv_capacity_tokens} tokens; "
        f"{sum(item.num_steps for item in result.points)} steps in {result.seconds:.0f} s"
    )
    if result.between_steps_s is not None:
        lines.append(
            f"the host takes {result.between_steps_s * 1e3:.2f} ms between steps, which `plan` and `simulate` add to "
            "each; --step-overhead-ms 0 where asynchronous scheduling hides it"
        )
    if result.transfer is not None:
        lines.append(
            f"KV travels over {result.transfer['wire']} at {result.transfer['bytes_per_s'] / 1e9:.2f} GB/s, "
            f"{result.transfer['latency_s'] * 1e3:.2f} ms before the first byte"
        )
    verdict, text = judge(fit)
    return [*lines, text if verdict == "good" else f"warning: {text}"]


def _measurement(result: Result, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(result.seconds, 1),
        "method": result.method,
        "engine": {name: value for name, value in result.facts.plain().items() if name != "model"},
        "host": {"system": platform.platform(), "python": platform.python_version()},
        "held_out_errors": _errors(result.fit),
        "held_out_errors_as_measured": _errors(result.as_measured),
        "drift": asdict(result.drift),
        "spreads": dict(spreads(result.points)),
        "ranges": {name: _range(result.points, value) for name, value in _RANGES.items()},
        "l_m_tokens": result.l_m_tokens,
        "between_steps_s": result.between_steps_s,
        "transfer": None if result.transfer is None else dict(result.transfer),
        "points": [
            [*asdict(item.point.work).values(), round(item.point.seconds, 6), item.num_steps] for item in result.points
        ],
        "points_columns": [*StepWork.__dataclass_fields__, "seconds", "num_steps"],
    }


def _errors(fit: Fit) -> dict[str, Any]:
    named = {str(region): asdict(error) for region, error in fit.errors.items()}
    if fit.mixed_lengths is not None:
        named["prefill_mixed_lengths"] = asdict(fit.mixed_lengths)
    return named


def _range(points: Sequence[Measured], value: Callable[[StepWork], int]) -> list[int]:
    values = [number for item in points if (number := value(item.point.work))]
    return [min(values), max(values)] if values else []
