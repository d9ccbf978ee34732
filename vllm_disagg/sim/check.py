"""What has to hold in every run, whatever is simulated. Tests call it on each."""

from __future__ import annotations

import numpy as np

from vllm_disagg.sim.outcome import DISPATCH, FINISH, STEP, TRANSFER, Outcome
from vllm_disagg.sim.system import System
from vllm_disagg.sim.workload import Floats, Workload


class BrokenInvariant(AssertionError):
    """The simulator has a bug; the text says what it did."""


def check_run(system: System, workload: Workload, outcome: Outcome) -> None:
    """Each request once, no time travel, memory never over capacity, no two steps or transfers in one place at once.

    Args:
        system, workload: what was simulated.
        outcome: of it; with a log, engines and links are checked too.

    Raises:
        BrokenInvariant: something is impossible.
    """
    served = ~outcome.refused
    _require(bool(np.all(np.isnan(outcome.finish_s) == outcome.refused)), "a request was lost or served though refused")
    for earlier, later in _order(outcome):
        begun, ended = earlier[served], later[served]
        both = ~np.isnan(begun) & ~np.isnan(ended)
        _require(bool(np.all(begun[both] <= ended[both])), "a request went back in time")
    phases = np.sum(list(outcome.phases().values()), axis=0)[served]
    until = np.where(np.isnan(outcome.first_decode_s), outcome.prefill_end_s, outcome.first_decode_s)[served]
    if system.phase == "both":
        alone = np.isnan(outcome.first_decode_s[served]) & (outcome.output_tokens[served] == 1)
        _require(
            bool(np.all(np.abs(phases - (until - outcome.arrival_s[served]))[~alone] < 1e-6)), "phases do not add up"
        )
    if len(outcome.log):
        _check_log(system, workload, outcome)


def _check_log(system: System, workload: Workload, outcome: Outcome) -> None:
    log = outcome.log
    _require(bool(np.all(log[:, 1] <= log[:, 2])), "something ended before it began")
    _require(bool(np.all(np.diff(log[:, 1]) >= 0)), "the log is out of order")
    for kind, what in ((DISPATCH, "dispatched"), (FINISH, "finished")):
        requests = np.sort(log[log[:, 0] == kind, 4])
        _require(np.array_equal(requests, np.flatnonzero(~outcome.refused)), f"a request was not {what} exactly once")
    steps = log[log[:, 0] == STEP]
    for number, engine in enumerate(system.engines):
        own = steps[steps[:, 3] == number]
        _require(bool(np.all(own[:, 7] <= engine.num_blocks) and np.all(own[:, 7] >= 0)), "KV over capacity")
        _require(bool(np.all(own[engine.pp :, 1] >= own[: -engine.pp, 2] - 1e-12)), "too many steps at once")
        _require(bool(np.all(own[:, 6] <= engine.max_num_seqs)), "more running requests than allowed")
        longest = max(engine.max_num_batched_tokens, int(workload.prompt_tokens.max() + workload.output_tokens.max()))
        limit = longest if engine.policy == "whole" else engine.max_num_batched_tokens
        if engine.policy != "prefill_first":
            _require(bool(np.all(own[:, 5] + own[:, 6] <= limit)), "a step over its token budget")
        if engine.policy == "prefill" and system.phase != "both":
            packed = max(engine.batch_tokens, min(longest, engine.max_num_batched_tokens))
            _require(bool(np.all(own[:, 5] + own[:, 6] <= packed)), "more prompts in a step than L_m allows")
    _check_links(system, log[log[:, 0] == TRANSFER])


def _check_links(system: System, transfers: Floats) -> None:
    """No end carries more than its bandwidth: the time that its transfers need fits between the first and the last."""
    between = transfers[transfers[:, 5] >= 0]
    ends = np.array(system.ends)
    for column in (3, 5):
        at = ends[between[:, column].astype(np.int64)]
        for end in np.unique(at):
            own = between[at == end]
            blocks_s = own[:, 6].sum() * system.kv_bytes_per_token / system.link.bytes_per_s
            needed_s = blocks_s * min(engine.block_size for engine in system.engines)
            available_s = own[:, 2].max() - own[:, 1].min()
            _require(needed_s <= available_s * (1 + 1e-9) + 1e-9, "a link end over its bandwidth")


def _order(outcome: Outcome) -> list[tuple[Floats, Floats]]:
    return [
        (outcome.arrival_s, outcome.prefill_start_s),
        (outcome.prefill_start_s, outcome.prefill_end_s),
        (outcome.prefill_end_s, outcome.transfer_start_s),
        (outcome.transfer_start_s, outcome.transfer_end_s),
        (outcome.transfer_end_s, outcome.decode_start_s),
        (outcome.prefill_end_s, outcome.decode_start_s),
        (outcome.decode_start_s, outcome.first_decode_s),
        (outcome.arrival_s, outcome.first_token_s),
        (outcome.first_token_s, outcome.finish_s),
        (outcome.prefill_end_s, outcome.finish_s),
    ]


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise BrokenInvariant(what)
