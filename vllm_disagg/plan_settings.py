"""Settings of `vllm-disagg plan`, `simulate` and `diagnose`. Light, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_disagg.config import EngineSettings, default_of, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentSettings:
    """What `plan` and `simulate` have in common: the engines, their settings and their targets."""

    profile: str = setting("opt-13b-a100-80g", "Step times: a profile by name, or the path of a JSON file.")
    model: str | None = setting(None, "Which model, where the profile's file holds several.")
    slo_ttft_s: float = setting(0.25, "Target for the time to first token, seconds.")
    slo_tpot_s: float = setting(0.1, "Target for the time per output token, seconds.")
    first_token: str = setting("decode", "Who sends the first token: decode, as this project does, or prefill.")
    kv_scheduling: str = setting(
        "phase",
        "How instances with a role schedule: phase or vllm, as the engines' flag of that name; distserve packs whole "
        "prompts up to L_m as they came, as the paper's engine does. Colocated instances have none.",
    )
    kv_prefill_order: str = setting(
        default_of(EngineSettings, "prefill_order"), "With phase, the engines' flag of that name: fcfs, sjf or edf."
    )
    kv_batch_tokens: int = setting(0, "L_m, the engines' flag of that name. 0: from the profile.")
    kv_held_share: float = setting(
        default_of(EngineSettings, "held_share"), "With phase, the engines' flag of that name."
    )
    kv_patience_s: float = setting(
        default_of(EngineSettings, "patience_s"), "With phase, the engines' flag of that name."
    )
    step_overhead_ms: float | None = setting(
        None,
        "Host time per engine step during which the device waits; 0 where asynchronous scheduling hides it. Default: "
        "what `vllm-disagg profile` has measured, 0 for a profile without that.",
    )
    handoff_ms: float = setting(0.0, "From a prompt's end to the request's arrival at decode, without the KV.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings(DeploymentSettings):
    """What to plan for."""

    prefill_profile: str | None = setting(
        None, "Profile of the same model on prefill's devices, if they are of another kind."
    )
    workload: str = setting(
        "sharegpt-like",
        "Requests: sharegpt-like, humaneval-like, longbench-like, fixed:PROMPT/OUTPUT, or the path of a trace "
        "(Mooncake, ShareGPT, Azure, BurstGPT), which is resampled.",
    )
    cv: float = setting(1.0, "Variability of the times between arrivals: 1 is a Poisson process, more comes in bursts.")
    goal: float = setting(0.9, "Share of the requests that have to meet both targets.")
    rate: float | None = setting(None, "Requests per second to serve. Without it: the most per device.")
    nodes: int = setting(1, "Nodes of the cluster.")
    devices_per_node: int = setting(8, "Devices in each.")
    intra_link: str | None = setting(
        None,
        "Link of each device inside its node: profile for the measured one, none, nvlink, pcie5, 200g or 25g. Default: "
        "profile where it has one, else nvlink.",
    )
    inter_link: str = setting("25g", "Link of each node to the others: none, nvlink, pcie5, 200g or 25g.")
    price: float = setting(1.0, "Price of a device, in any unit. Placements are ranked by goodput per price.")
    prefill_price: float | None = setting(None, "Price of one of prefill's devices, if it is another.")
    seeds: int = setting(5, "Workloads to measure the best placements with; their spread is the interval.")
    processes: int = setting(2, "Cores that search.")
    accept_fit: bool = setting(
        False,
        "Plan even where the profile's step times were fitted with a median error above 15 % on held-out points.",
    )
    explain: bool = setting(False, "Also print DistServe's equations 1 to 3 with this model's numbers.")
    out: str | None = setting(None, "Write the plan as JSON to this file.")
    plot: str | None = setting(
        None,
        "Draw into this file what other targets and rates would change: goodput over both targets' scale, attainment "
        "over the rate. SVG, PNG or PDF; needs matplotlib.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateSettings(DeploymentSettings):
    """What to simulate."""

    workload: str = setting("sharegpt-like", "Requests, as for `plan`. A trace is replayed in its own order.")
    cv: float = setting(1.0, "Variability of the times between arrivals, as for `plan`.")
    prefill: int = setting(0, "Number of prefill instances. 0: the others are colocated ones.")
    decode: int = setting(1, "Number of decode instances, or of colocated ones.")
    prefill_tp: int = setting(1, "Tensor-parallel size of a prefill instance.")
    prefill_pp: int = setting(1, "Pipeline stages of a prefill instance.")
    tp: int = setting(1, "Tensor-parallel size of a decode or colocated instance.")
    pp: int = setting(1, "Pipeline stages of a decode or colocated instance.")
    policy: str = setting("chunked", "How colocated instances form steps: chunked, whole or prefill_first.")
    max_num_batched_tokens: int = setting(2048, "Tokens per step of a decode or colocated instance.")
    max_num_seqs: int = setting(1024, "Running requests of an instance.")
    link: str | None = setting(
        None,
        "Link between instances: profile for the measured one, as often as the smaller instance has devices; none, "
        "nvlink, pcie5, 200g or 25g. Default: profile where it has one, else nvlink.",
    )
    rates: str = setting("0.5,1,2,4,8", "Requests per second, one run for each.")
    requests: int = setting(5000, "Requests of a run.")
    seed: int = setting(0, "Of the workload.")
    out: str | None = setting(None, "Write the results as JSON to this file.")
    plot: str | None = setting(
        None,
        "Draw attainment and latencies over the rate into this file: SVG, PNG or PDF. Needs matplotlib.",
    )
    timeline: str | None = setting(
        None, "Write what happened in the run at the first rate as a trace that ui.perfetto.dev opens."
    )
    timeline_window: str = setting("0,60", "Which part of it: FROM,TO in seconds.")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiagnoseSettings:
    """Which engines to watch."""

    urls: tuple[str, ...] = setting((), "URL of a running vLLM API server. May be given several times.")
    window_s: float = setting(60.0, "How long to watch, seconds.")
    interval_s: float = setting(1.0, "Between two looks at what is running, waiting and in the KV cache, seconds.")
