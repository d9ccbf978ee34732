"""Runs the compiled simulator: lays a system and a workload out as the arrays of `kernel`, and reads back."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, get_args

import numpy as np

from vllm_disagg.core.latency import LatencyModel, Regime
from vllm_disagg.core.scheduling.order import Policy as Order
from vllm_disagg.core.scheduling.packing import LOOK_AHEAD
from vllm_disagg.sim.kernel import state as k
from vllm_disagg.sim.kernel.run import run
from vllm_disagg.sim.outcome import LOG_COLUMNS, Outcome
from vllm_disagg.sim.reference.state import answers_of
from vllm_disagg.sim.system import System
from vllm_disagg.sim.workload import Workload

_POLICIES: Final[dict[str, Any]] = {
    "chunked": k.CHUNKED,
    "whole": k.WHOLE,
    "prefill_first": k.PREFILL_FIRST,
    "prefill": k.OURS_PREFILL,
    "decode": k.OURS_DECODE,
}
_PHASES: Final[dict[str, Any]] = {"both": 0, "prefill": 1, "decode": k.DECODE_ONLY}


def run_compiled(system: System, workload: Workload, *, log: bool = False) -> Outcome:
    """`Simulation(system, workload, log=log).run()`, fast."""
    log_rows = 16 * len(workload) if log else 0
    while True:
        outcome, logged = _attempt(system, workload, log_rows)
        if logged <= log_rows or not log:
            return outcome
        log_rows = logged


def _attempt(system: System, workload: Workload, log_rows: int) -> tuple[Outcome, int]:
    num, engines = len(workload), system.engines
    prefixes = workload.prefixes
    num_chunks = prefixes.num_chunks if prefixes else 0
    max_stages = max(engine.pp for engine in engines)
    max_seqs = min(num, max(engine.max_num_seqs for engine in engines))
    R, T, num_kinds = _requests(system, workload)
    E, F = _engines(system, prefixes.chunk_tokens if prefixes else 0, max_seqs, max_stages)
    S, X = _system(system)
    rows = np.zeros((log_rows, len(LOG_COLUMNS)))
    parts = np.zeros((len(engines), max_stages, max_seqs + 1, 2), dtype=np.int64)
    left = np.full((len(engines), num_chunks + num, 4), k.NONE, dtype=np.int64) if num_chunks else None
    heap = np.zeros((3 * num + (max_stages + 4) * len(engines), 4))
    W, G, ranks = _memory(system, E, num, num_kinds)
    ids = prefixes.ids if num_chunks and prefixes else None
    with _without_collector(version=(left is None, ranks is None)):
        run(R, T, E, F, S, X, W, G, _latencies(system), parts, ids, left, ranks, heap, rows)
    logged = int(S[k.LOGGED])
    return _outcome(R, T, S, rows[:logged]), logged


@contextmanager
def _without_collector(version: tuple[bool, bool]) -> Iterator[None]:
    """Compiling makes millions of objects that stay; looking for garbage among them takes a tenth of its time, or more
    where much is loaded already. So the collector rests during the first run of each version of the kernel."""
    rests = version not in _ready and gc.isenabled()
    if rests:
        gc.disable()
    try:
        yield
    finally:
        _ready.add(version)
        if rests:
            gc.enable()


_ready: set[tuple[bool, bool]] = set()


def _requests(system: System, workload: Workload) -> tuple[Any, Any, int]:
    num = len(workload)
    R, T = _in_lines(num, int(k.NUM_R), np.int64), _in_lines(num, int(k.NUM_T), np.float64)
    T[:] = math.nan
    R[:, k.PROMPT] = R[:, k.KNOWN] = workload.prompt_tokens
    R[:, k.TOTAL] = workload.prompt_tokens + (1 if system.phase == "prefill" else workload.output_tokens)
    for column in (k.P, k.D, k.NEXT, k.PREVIOUS, k.NEXT_AWAY, k.PREVIOUS_AWAY, k.NEXT_HOLD, k.CACHED):
        R[:, column] = k.NONE
    most, kinds = answers_of(workload)
    different, R[:, k.KIND] = np.unique(np.asarray(kinds), return_inverse=True)
    R[:, k.MOST] = most
    if workload.prefixes is not None:
        R[:, k.FIRST_CHUNK], R[:, k.NUM_CHUNKS] = (
            workload.prefixes.offsets[:-1],
            np.diff(workload.prefixes.offsets),
        )
    T[:, k.ARRIVAL] = workload.arrival_s
    T[:, k.HOLD_UNTIL] = math.inf
    return R, T, len(different)


def _in_lines(num: int, columns: int, kind: Any) -> Any:
    """Rows of whole lines of the processor's cache, of 64 bytes. There is a row for each request, more than a cache
    holds."""
    width = -(-columns // 8) * 8
    room = np.zeros(num * width + 8, dtype=kind)
    begin = -room.ctypes.data % 64 // 8
    return room[begin : begin + num * width].reshape(num, width)


def _engines(system: System, chunk_tokens: int, max_seqs: int, max_stages: int) -> tuple[Any, Any]:
    engines = system.engines
    E = np.zeros((len(engines), k.NUM_E + max_seqs), dtype=np.int64)
    F = np.zeros((len(engines), k.NUM_F + max_stages))
    for i, engine in enumerate(engines):
        E[i, k.BLOCKS] = E[i, k.FREE] = engine.num_blocks
        E[i, k.BLOCK_SIZE], E[i, k.STAGES], E[i, k.POLICY] = (
            engine.block_size,
            engine.pp,
            _POLICIES[engine.policy],
        )
        E[i, k.BUDGET], E[i, k.MAX_SEQS] = engine.max_num_batched_tokens, min(engine.max_num_seqs, max_seqs)
        E[i, k.WATERMARK], E[i, k.CHUNK_TOKENS] = (
            engine.watermark_blocks,
            chunk_tokens if engine.prefix_cache else 0,
        )
        E[i, k.SIDE], E[i, k.END] = int(i >= len(system.prefill)), system.ends[i]
        for column in (
            k.WAITING,
            k.WAITING_LAST,
            k.AWAY,
            k.AWAY_LAST,
            k.PARKED,
            k.PARKED_LAST,
            k.HOLD,
            k.HOLD_LAST,
            k.LEFT_FIRST,
            k.LEFT_LAST,
        ):
            E[i, column] = k.NONE
        rules = engine.rules
        E[i, k.ORDER] = get_args(Order).index(rules.prefill_order)
        E[i, k.BATCH_TOKENS], E[i, k.MOST_BATCH] = engine.batch_tokens, engine.most_batch_tokens
        F[i, : k.NUM_F] = (
            engine.step_overhead_s, engine.request_overhead_s, engine.hop_s, math.nan, 0.0, rules.held_share,
            rules.patience_s, rules.slo_ttft_s, rules.slo_tpot_s,
        )  # fmt: skip
    return E, F


def _memory(system: System, E: Any, num_requests: int, num_kinds: int) -> tuple[Any, Any, Any]:
    """What engines remember, scratch paper, and more of it where some engine orders prompts by another rule than
    their arrival."""
    engines = system.engines
    learns = any(engine.policy == "decode" for engine in engines)
    E[:, k.BY_GROWTH] = k.FIRST_WINDOW + (1 + num_kinds if learns else 0) * k.WINDOW_SIZE
    growths = 2 * (max(engine.num_blocks for engine in engines) + 1) if learns else 0
    W = np.zeros((len(engines), int(E[0, k.BY_GROWTH]) + growths), dtype=np.int64)
    G = np.zeros((k.NUM_G, LOOK_AHEAD), dtype=np.int64)
    orders = any(engine.policy == "prefill" and engine.rules.prefill_order != "fcfs" for engine in engines)
    return W, G, np.zeros((k.NUM_RANKS, num_requests)) if orders else None


def _system(system: System) -> tuple[Any, Any]:
    S = np.zeros(k.NUM_S + len(system.engines) + 1, dtype=np.int64)
    X = np.zeros(k.NUM_X + 2 * (max(system.ends) + 1))
    S[k.NUM_PREFILL], S[k.FIRST_FROM_PREFILL] = len(system.prefill), int(system.first_token == "prefill")  # noqa: S105
    S[k.READS_EARLY] = int(system.early_reads and len(system.prefill) > 0)
    S[k.MIN_SPLIT], S[k.PHASE], S[k.KV_BYTES] = (
        system.min_split_tokens,
        _PHASES[system.phase],
        system.kv_bytes_per_token,
    )
    X[:k.NUM_X] = (
        system.link.bytes_per_s, system.link.latency_s, system.handoff_s, system.dispatch_s, system.hold_cap_s,
        system.pull_timeout_s,
    )  # fmt: skip
    return S, X


def _latencies(system: System) -> Any:
    """Regimes by engine and kind of step; a kind without regimes has an endless one at NaN to mark it."""
    models = [engine.latency for engine in system.engines]
    most = max(len(regimes) for model in models for regimes in (model.prefill, model.decode, model.mixed))
    table = np.full((len(models), 3, most, k.NUM_REGIME), math.nan)
    for i, model in enumerate(models):
        for kind, regimes in enumerate(_regimes(model)):
            for which, regime in enumerate(regimes):
                table[i, kind, which] = (
                    regime.up_to, regime.constant_s, regime.per_token_s, regime.per_area_s, regime.per_prefill_s,
                    regime.per_decode_s, regime.per_context_s,
                )  # fmt: skip
    return table


def _regimes(model: LatencyModel) -> tuple[tuple[Regime, ...], ...]:
    return model.prefill, model.decode, model.mixed


def _outcome(R: Any, T: Any, S: Any, log: Any) -> Outcome:
    return Outcome(
        arrival_s=T[:, k.ARRIVAL],
        prefill_start_s=T[:, k.PREFILL_START],
        prefill_end_s=T[:, k.PREFILL_END],
        transfer_start_s=T[:, k.TRANSFER_START],
        transfer_end_s=T[:, k.TRANSFER_END],
        decode_start_s=T[:, k.DECODE_START],
        first_decode_s=T[:, k.FIRST_DECODE],
        first_token_s=T[:, k.FIRST_TOKEN],
        finish_s=T[:, k.FINISHED],
        longest_gap_s=T[:, k.LONGEST_GAP],
        output_tokens=R[:, k.TOTAL] - R[:, k.PROMPT],
        prefill_instance=R[:, k.P],
        decode_instance=R[:, k.D],
        cached_tokens=np.maximum(R[:, k.CACHED], 0),
        num_preemptions=R[:, k.PREEMPTIONS],
        refused=R[:, k.REFUSED] == 1,
        num_steps=int(S[k.STEPS]),
        num_events=int(S[k.EVENTS]),
        log=log,
    )
