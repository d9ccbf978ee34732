"""`vllm-disagg plan` and `vllm-disagg simulate`: read, ask the planner or the simulator, print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, cast, get_args

import numpy as np

from vllm_disagg.config import PrefillOrder, Role
from vllm_disagg.core.link import LINKS, Link
from vllm_disagg.core.profile import ParallelEntry, Profile
from vllm_disagg.core.scheduling.rules import Rules
from vllm_disagg.core.slo import SLO
from vllm_disagg.errors import ConfigError
from vllm_disagg.plan_plots import draw_rates, draw_sensitivity, require_drawable
from vllm_disagg.plan_settings import DeploymentSettings, PlanSettings, SimulateSettings
from vllm_disagg.planner.candidates import Resources
from vllm_disagg.planner.cluster import Cluster, EngineOptions, Pool, Scheduling, critical_length
from vllm_disagg.planner.fit import judge_profile
from vllm_disagg.planner.goodput import SearchSettings, find_goodput
from vllm_disagg.planner.placement import Mapper, Question
from vllm_disagg.planner.plan import Plan, explain, make_plan, plan_document
from vllm_disagg.planner.sensitivity import Sensitivity, crossings, sensitivity
from vllm_disagg.profiles import load_profile
from vllm_disagg.sim.arrivals import Arrivals
from vllm_disagg.sim.lengths import SURROGATES, FixedLengths, Lengths, lengths_of, make_workload
from vllm_disagg.sim.outcome import PHASES
from vllm_disagg.sim.run import has_numba, simulate
from vllm_disagg.sim.system import EngineSpec, FirstToken, Policy, System
from vllm_disagg.sim.timeline import chrome_trace, parse_window
from vllm_disagg.sim.traces import read_trace
from vllm_disagg.sim.workload import Floats, Workload

MEASURED: Final = "profile"
"""Name of the link that a profile has measured."""

NUM_REQUESTS = 20_000
"""Of each workload that a plan is made with; a search uses as many of them as it needs."""


def run_plan(settings: PlanSettings) -> list[str]:
    """Make a plan and return the lines to print."""
    require_writable(out=settings.out, plot=settings.plot)
    question = question_of(settings)
    doubts = doubts_of(question, accept=settings.accept_fit)
    drawn, kept = NUM_REQUESTS * len(question.workloads), sum(map(len, question.workloads))
    doubts += _too_long(drawn - kept, drawn, question.resources.model.max_model_len)
    around: list[str] = []
    with _mapper(settings.processes) as mapper:
        plan = make_plan(question, mapper)
        if settings.plot:
            found = sensitivity(question, plan.ranking, mapper)
            draw_sensitivity(settings.plot, found, question.slo, question.search.goal)
            around = [_around(found)]
    if settings.out:
        _write(settings.out, plan_document(plan))
    pools = question.resources.prefill, question.resources.decode
    used = measurements_used(
        [entry for pool in pools for entry in pool.profile.entries.values()],
        hosts=settings.step_overhead_ms is None,
        link=settings.intra_link in (None, MEASURED),
    )
    lines = [*plan_table(plan), "", plan.verdict, *around, *used, *(f"warning: {doubt}" for doubt in doubts)]
    if settings.explain:
        lines += ["", *explain(question, settings.rate)]
    return lines


def question_of(settings: PlanSettings) -> Question:
    """The planner's question.

    Raises:
        ConfigError: a setting is out of range, or a file cannot be read.
    """
    profile = load_profile(settings.profile, model=settings.model)
    prefill = load_profile(settings.prefill_profile, model=settings.model) if settings.prefill_profile else profile
    lengths = lengths_from(settings.workload)
    if settings.seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, not {settings.seeds}")
    slo = SLO(ttft_s=settings.slo_ttft_s, tpot_s=settings.slo_tpot_s)
    workloads = tuple(
        make_workload(lengths, num_requests=NUM_REQUESTS, seed=seed, arrivals=Arrivals(cv=settings.cv)).capped(
            profile.model.max_model_len
        )
        for seed in range(settings.seeds)
    )
    longest = max(int((workload.prompt_tokens + workload.output_tokens).max()) for workload in workloads)
    return Question(
        resources=Resources(
            prefill=Pool(
                profile=prefill, price=settings.price if settings.prefill_price is None else settings.prefill_price
            ),
            decode=Pool(profile=profile, price=settings.price),
            cluster=Cluster(
                num_nodes=settings.nodes,
                devices_per_node=settings.devices_per_node,
                intra=_link_of(
                    "--intra-link", settings.intra_link, [*prefill.entries.values(), *profile.entries.values()]
                ),
                inter=_link("--inter-link", settings.inter_link),
            ),
            options=EngineOptions(
                first_token=_first_token(settings.first_token),
                scheduling=_scheduling(settings.kv_scheduling),
                rules=_rules(settings),
                step_overhead_s=_seconds(settings.step_overhead_ms),
                handoff_s=settings.handoff_ms / 1e3,
            ),
            longest_tokens=longest,
        ),
        workloads=workloads,
        slo=slo,
        rate=settings.rate,
        search=SearchSettings(goal=settings.goal),
    )


def doubts_of(question: Question, *, accept: bool) -> list[str]:
    """What is to be said of the fits that the plan rests on.

    Raises:
        ConfigError: a fit is too bad to plan with, unless that is accepted.
    """
    doubts = []
    profiles = {id(pool.profile): pool.profile for pool in (question.resources.prefill, question.resources.decode)}
    for profile in profiles.values():
        verdict, text = judge_profile(profile)
        if verdict == "refuse" and not accept:
            raise ConfigError(f"{text}, or plan all the same with --accept-fit")
        if verdict in ("warn", "refuse"):
            doubts.append(text)
    return doubts


def plan_table(plan: Plan) -> list[str]:
    """The ranking, best first."""
    head = ("placement", "devices", "goodput/s", "per price", "limited by")
    rows = [
        (
            score.candidate.name,
            str(score.candidate.num_devices),
            f"{score.goodput.mean:.2f} ± {score.goodput.half_width:.2f}",
            f"{score.per_price:.3f}",
            score.limit,
        )
        for score in plan.ranking
    ]
    return _table(head, rows)


def _around(found: Sensitivity) -> str:
    """What other targets would change, in one line."""
    low, high = found.scales[0], found.scales[-1]
    if len(found.lines) < 2:
        return f"no other kind of placement meets the targets, scaled by {low:g} to {high:g} or not"
    if points := crossings(found):
        where = " and ".join(f"{point:.2g}" for point in points)
        return f"with both targets times {where} the better kind changes"
    return f"the better kind stays the same with both targets times {low:g} to {high:g}"


def run_simulate(settings: SimulateSettings) -> list[str]:
    """Simulate at each rate and return the lines to print."""
    require_writable(out=settings.out, plot=settings.plot, timeline=settings.timeline)
    rates, window_s = _rates(settings.rates), parse_window(settings.timeline_window)
    system, slo = system_of(settings), SLO(ttft_s=settings.slo_ttft_s, tpot_s=settings.slo_tpot_s)
    profile = load_profile(settings.profile, model=settings.model)
    longest = profile.model.max_model_len
    whole = replayed(settings)
    workload = whole.capped(longest)
    doubts = _too_long(len(whole) - len(workload), len(whole), longest)
    rows, found = [], []
    if settings.timeline:
        drawn = simulate(system, workload.paced(rates[0]), log=True)
        _write(settings.timeline, chrome_trace(system, drawn, window_s=window_s), indent=None)
    for rate in rates:
        outcome = simulate(system, workload.paced(rate))
        window = outcome.window(0.1)
        ttft, tpot = outcome.ttft_s[window], outcome.tpot_s[window]
        latencies = {
            f"{name}_p{percent}_s": _percentile(values, percent)
            for name, values in (("ttft", ttft), ("tpot", tpot))
            for percent in (50, 90)
        }
        result: dict[str, Any] = {
            "rate": rate,
            "attainment": outcome.attainment(slo, skip=0.1),
            **{name: value if value is not None and np.isfinite(value) else None for name, value in latencies.items()},
            "phases_s": {name: _mean(values[window]) for name, values in outcome.phases().items()},
            "preemptions": int(outcome.num_preemptions.sum()),
            "refused": int(outcome.refused.sum()),
        }
        found.append(result)
        if outcome.refused.any():
            doubts += [f"at {rate:g}/s {_some(int(outcome.refused.sum()), len(workload))} refused: an instance's KV "
                       "cache or step is too small for them"]  # fmt: skip
        rows.append(
            (
                f"{rate:g}", f"{result['attainment']:.1%}", *map(_ms, latencies.values()),
                *(_ms(result["phases_s"][name]) for name in PHASES), str(result["preemptions"]),
            )
        )  # fmt: skip
    goodput, said = _goodput(system, settings, workload, slo, longest)
    if settings.out:
        document = {"workload": workload.source, "goodput": goodput, "runs": found}
        _write(settings.out, {"format": "vllm-disagg-simulation", "version": 1, **document})
    if settings.plot:
        draw_rates(settings.plot, found, slo, goodput)
    used = measurements_used(
        _entries_of(settings, profile),
        hosts=settings.step_overhead_ms is None,
        link=settings.prefill > 0 and settings.link in (None, MEASURED),
    )
    head = ("rate/s", "attainment", "TTFT p50", "p90", "TPOT p50", "p90", *PHASES, "preemptions")
    return [
        f"{workload.source}; times in ms, phases as means",
        *_table(tuple(name.replace("_", " ") for name in head), rows),
        "",
        *used,
        said,
        *(f"warning: {doubt}" for doubt in doubts),
    ]


def _goodput(
    system: System, settings: SimulateSettings, workload: Workload, slo: SLO, longest: int
) -> tuple[float | None, str]:
    """The goodput, None where a trace is too short to tell, and the line to print."""
    if not _is_file(settings.workload):
        workload = replayed(replace(settings, requests=NUM_REQUESTS)).capped(longest)
    try:
        goodput = find_goodput(system, [workload], slo).mean
    except ConfigError as error:
        return None, f"goodput not known: {error}"
    devices = system.num_devices
    each = f"{devices} device{'s' if devices > 1 else ''}"
    return goodput, f"goodput {goodput:.2f} requests/s, {goodput / devices:.2f} per device ({each})"


def system_of(settings: SimulateSettings) -> System:
    """The system to simulate.

    Raises:
        ConfigError: a setting is out of range, or the model does not fit.
    """
    profile = load_profile(settings.profile, model=settings.model)
    policy, scheduling = _policy("--policy", settings.policy), _scheduling(settings.kv_scheduling)
    if settings.prefill < 0 or settings.decode < 1:
        raise ConfigError(
            f"--prefill must be 0 or more and --decode at least 1, not {settings.prefill} and {settings.decode}"
        )
    for name in ("tp", "pp", "prefill_tp", "prefill_pp"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(settings, name)}")

    def engine(tp: int, pp: int, policy: Policy, budget: int, rules: Rules) -> EngineSpec:
        given_s, entry = _seconds(settings.step_overhead_ms), profile.entry(tp)
        return EngineSpec(
            latency=entry.latency,
            kv_tokens=profile.kv_capacity_tokens(tp, pp),
            pp=pp,
            policy=policy,
            rules=rules,
            max_num_batched_tokens=budget,
            max_num_seqs=settings.max_num_seqs,
            step_overhead_s=(entry.between_steps_s or 0.0) if given_s is None else given_s,
            num_devices=tp * pp,
        )

    rules, prefill_budget = _rules(settings), EngineOptions().prefill_budget
    l_m = rules.batch_tokens or critical_length(
        profile.entry(settings.prefill_tp).latency, EngineOptions().l_m_share, longest=profile.model.max_model_len
    )
    of_prefill: tuple[Policy, int] = "chunked", prefill_budget
    if settings.prefill and scheduling == "phase":
        policy, of_prefill = "decode", ("prefill", prefill_budget)
    elif scheduling == "distserve":
        of_prefill = "whole", l_m
    packs = replace(rules, batch_tokens=l_m, backlog=not rules.batch_tokens)
    lanes = min(settings.prefill_tp * settings.prefill_pp, settings.tp * settings.pp)
    return System(
        prefill=(engine(settings.prefill_tp, settings.prefill_pp, *of_prefill, packs),) * settings.prefill,
        decode=(engine(settings.tp, settings.pp, policy, settings.max_num_batched_tokens, rules),) * settings.decode,
        link=_link_of("--link", settings.link, _entries_of(settings, profile), lanes=lanes),
        kv_bytes_per_token=profile.model.kv_bytes_per_token,
        handoff_s=settings.handoff_ms / 1e3,
        first_token=_first_token(settings.first_token),
    )


def _entries_of(settings: SimulateSettings, profile: Profile) -> list[ParallelEntry]:
    """Those of the instances that are simulated."""
    degrees = {settings.tp, *((settings.prefill_tp,) if settings.prefill else ())}
    return [profile.entry(tp) for tp in sorted(degrees)]


def replayed(settings: SimulateSettings) -> Workload:
    """The workload to simulate: a trace in its own order, anything else drawn."""
    if settings.requests < 1:
        raise ConfigError(f"--requests must be at least 1, not {settings.requests}")
    if settings.seed < 0:
        raise ConfigError(f"--seed must be 0 or more, not {settings.seed}")
    if _is_file(settings.workload):
        return read_trace(settings.workload).head(settings.requests)
    lengths, arrivals = lengths_from(settings.workload), Arrivals(cv=settings.cv)
    return make_workload(lengths, num_requests=settings.requests, seed=settings.seed, arrivals=arrivals)


def lengths_from(name: str) -> Lengths:
    """The lengths that a workload's name or file stands for.

    Raises:
        ConfigError: it stands for nothing.
    """
    if name in SURROGATES:
        return SURROGATES[name]
    if name.startswith("fixed:"):
        prompt, _, output = name.removeprefix("fixed:").partition("/")
        if not all(part.isdecimal() and 0 < len(part) < 10 and int(part) > 0 for part in (prompt, output)):
            raise ConfigError(f"--workload: expected fixed:PROMPT/OUTPUT in tokens, such as fixed:512/64, not {name!r}")
        return FixedLengths(prompt_tokens=int(prompt), output_tokens=int(output))
    if not _is_file(name):
        raise ConfigError(
            f"--workload: {name!r} is neither a file nor one of {', '.join(sorted(SURROGATES))}, fixed:PROMPT/OUTPUT"
        )
    return lengths_of(read_trace(name))


def _is_file(workload: str) -> bool:
    """Whether it is a trace: what has a meaning of its own is none, whatever lies in the folder."""
    return not (workload in SURROGATES or workload.startswith("fixed:")) and bool(workload) and Path(workload).exists()


def _too_long(number: int, of: int, longest: int) -> list[str]:
    """What is to be said of requests that no engine takes."""
    if not number:
        return []
    return [f"{_some(number, of)} longer than the model's {longest} tokens and left out"]


def _some(number: int, of: int) -> str:
    share = number / of
    return f"{number} of {of} requests ({share:.2%} of them) {'is' if number == 1 else 'are'}"


@contextmanager
def _mapper(processes: int) -> Iterator[Mapper]:
    """`map`, on several cores if so many are wanted: in threads where the simulator is compiled, since it then lets go
    of the interpreter and has to be compiled only once; else in processes."""
    if processes < 1:
        raise ConfigError(f"--processes must be at least 1, not {processes}")
    if processes == 1:
        yield map
        return
    pool: Executor = (
        ThreadPoolExecutor(processes)
        if has_numba()
        else ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    )
    with pool:
        yield pool.map


def measurements_used(entries: Sequence[ParallelEntry], *, hosts: bool, link: bool) -> list[str]:
    """What is taken from a profile beside step times, a line each.

    Args:
        entries: that may be used.
        hosts: the host's time is theirs, where they have it.
        link: the link is theirs, likewise.
    """
    lines, hosts_ms = [], sorted({f"{(entry.between_steps_s or 0.0) * 1e3:.2f}" for entry in entries}, key=float)
    if hosts and any(entry.between_steps_s for entry in entries):
        values = " to ".join(dict.fromkeys((hosts_ms[0], hosts_ms[-1])))
        lines.append(f"the host's time per step as measured: {values} ms; --step-overhead-ms 0 where it is hidden")
    if link and (found := measured_link(entries)) is not None:
        lines.append(
            f"the link as measured: {found.bytes_per_s / 1e9:.2f} GB/s from rank to rank, "
            f"{found.latency_s * 1e3:.2f} ms before the first byte"
        )
    return lines


def measured_link(entries: Iterable[ParallelEntry]) -> Link | None:
    """The slowest that was measured; None where none was."""
    links = [entry.link for entry in entries if entry.link is not None]
    return min(links, key=lambda link: link.bytes_per_s, default=None)


def _link_of(option: str, name: str | None, entries: Iterable[ParallelEntry], *, lanes: int = 1) -> Link:
    """The link that an option names; the measured one, so many times, where it names none or that."""
    found = measured_link(entries)
    if name in (None, MEASURED) and found is not None:
        return replace(found, bytes_per_s=found.bytes_per_s * lanes)
    if name == MEASURED:
        raise ConfigError(
            f"{option} {MEASURED}: this profile has measured none; measure it (`vllm-disagg profile` with --prefill "
            f"and --decode), or name one of {', '.join(LINKS)}"
        )
    return _link(option, name or "nvlink")


def _link(option: str, name: str) -> Link:
    if name not in LINKS:
        raise ConfigError(f"{option}: the link must be one of {', '.join(LINKS)}, not {name!r}")
    return LINKS[name]


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _policy(option: str, name: str) -> Policy:
    colocated = [policy for policy in get_args(Policy) if policy not in get_args(Role)]
    if name not in colocated:
        raise ConfigError(f"{option} must be one of {', '.join(colocated)}, not {name!r}")
    return cast(Policy, name)


def _scheduling(name: str) -> Scheduling:
    if name not in get_args(Scheduling):
        raise ConfigError(f"--kv-scheduling must be one of {', '.join(get_args(Scheduling))}, not {name!r}")
    return cast(Scheduling, name)


def _rules(settings: DeploymentSettings) -> Rules:
    """The engines' settings; their targets are those of the plan."""
    return Rules(
        prefill_order=cast(PrefillOrder, settings.kv_prefill_order),
        batch_tokens=settings.kv_batch_tokens,
        held_share=settings.kv_held_share,
        patience_s=settings.kv_patience_s,
        slo_ttft_s=settings.slo_ttft_s,
        slo_tpot_s=settings.slo_tpot_s,
    )


def _first_token(name: str) -> FirstToken:
    if name not in get_args(FirstToken):
        raise ConfigError(f"--first-token must be one of {', '.join(get_args(FirstToken))}, not {name!r}")
    return cast(FirstToken, name)


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        rates = []
    if not rates or not all(np.isfinite(rate) and rate > 0 for rate in rates):
        raise ConfigError(f"--rates must be positive numbers with commas between them, not {text!r}")
    return rates


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns with as much room as they need: the first to the left, the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f}" if np.isfinite(seconds) else "never"


def _percentile(values: Floats, percent: float) -> float | None:
    """None where there is nothing to take it of; infinite where it is of a request that is refused."""
    if np.isnan(values).all():
        return None
    return float(np.nanpercentile(values, percent, method="nearest" if np.isinf(values).any() else "linear"))


def _mean(values: Floats) -> float | None:
    """None where there is nothing to take it of."""
    return None if np.isnan(values).all() else float(np.nanmean(values))


def require_writable(*, plot: str | None = None, **files: str | None) -> None:
    """Find out before minutes are spent on what is to be written.

    Args:
        plot, files: by the names of their options; None for what is not wanted.

    Raises:
        ConfigError: a file's folder is not there, it is a folder itself, or of no kind that can be drawn.
    """
    for name, path in {"plot": plot, **files}.items():
        if path is None:
            continue
        if not Path(path).absolute().parent.is_dir():
            raise ConfigError(
                f"--{name} {path} cannot be written: No such file or directory: {Path(path).absolute().parent}"
            )
        if Path(path).is_dir():
            raise ConfigError(f"--{name} {path} is a folder: name a file in it")
    if plot is not None:
        require_drawable(plot)


def _write(path: str, document: dict[str, Any], *, indent: int | None = 1) -> None:
    try:
        Path(path).write_text(json.dumps(document, indent=indent, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
