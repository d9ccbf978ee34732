"""The scheduler half on a decode instance: which requests wait for KV, into which blocks it comes, and what became
of it. One owner for every parked request: it is reported to vLLM exactly once.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vllm_disagg.connector.control_client import DecodeControl
from vllm_disagg.connector.peers import CONNECT_TIMEOUT_S, HELLO_TIMEOUT_S
from vllm_disagg.connector.pull import Drained, Settled
from vllm_disagg.connector.recent import RecentIds
from vllm_disagg.connector.request_facts import kv_params, prompt_salt
from vllm_disagg.connector.stats import TransferStats
from vllm_disagg.connector.tally import Tally
from vllm_disagg.connector.worker_thread import ReadJob
from vllm_disagg.core.handoff import Handoff, check_fits, unseal
from vllm_disagg.core.types import BlockIds, TransferId
from vllm_disagg.errors import InvalidHandoff

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

PAIRING_LIMIT_S = HELLO_TIMEOUT_S + CONNECT_TIMEOUT_S + 5.0
"""How long a request may wait for its prefill engine to be connected, whatever the control thread does."""

_USED_S = 3600.0
"""How long a handoff is remembered as used. Its hold ends long before: at ten leases."""

_FAILURES = "vllm_disagg_kv_failures_total"
_RECOMPUTED = "vllm_disagg_kv_recomputed_tokens_total"


@dataclass(slots=True, kw_only=True)
class _Fetch:
    """One request that came with a handoff, until its KV is here, has failed, or is not wanted."""

    request_id: str
    handoff: Handoff
    announced_s: float
    phase: Literal["announced", "parked"] = "announced"
    blocks: BlockIds = ()
    num_tokens: int = 0
    parked_s: float = 0.0
    abandoned: bool = False
    refused: str = ""


@dataclass(frozen=True, slots=True)
class ReceiveReport:
    """A parked request's end: `ok` says whether its blocks now hold its prompt's KV."""

    request_id: str
    ok: bool


class DecodeSide:
    """Fetches the KV of requests that prefill has handed over. All methods run on vLLM's main thread.

    Args:
        control: the control thread that follows the pulls.
        key: the deployment key.
        block_size: tokens per block.
        num_groups: KV cache groups of the engine.
        overdue_s: a parked request that the control thread has not settled after this is failed without it.
    """

    def __init__(
        self, *, control: DecodeControl, key: bytes, block_size: int, num_groups: int, overdue_s: float
    ) -> None:
        self._control, self._key, self._overdue_s = control, key, overdue_s
        self._block_size, self._num_groups = block_size, num_groups
        self._by_request: dict[str, _Fetch] = {}
        self._by_transfer: dict[TransferId, _Fetch] = {}
        self._reads: list[ReadJob] = []
        self._draining: dict[TransferId, BlockIds] = {}
        self._used = RecentIds(keep_s=_USED_S)
        self._pool: BlockPool | None = None
        self._stats = TransferStats()
        self._pairs = Tally()

    def bind_block_pool(self, pool: BlockPool) -> None:
        """vLLM's block pool, once it exists."""
        self._pool = pool

    def on_new_request(self, request: Request) -> None:
        """Check the handoff and get ready to fetch. Whatever is wrong with it costs a local prefill, nothing else."""
        params = kv_params(request)
        if not params.get("do_remote_prefill"):
            return
        try:
            handoff = self._accept(request, params.get("handoff"))
        except InvalidHandoff as refusal:
            logger.warning("handoff.refused request=%s reason=%s", request.request_id, refusal)
            self._count_failure(refusal.cause, request.num_prompt_tokens)
            return
        now_s = time.monotonic()
        fetch = _Fetch(request_id=request.request_id, handoff=handoff, announced_s=now_s)
        self._by_request[fetch.request_id] = self._by_transfer[handoff.transfer_id] = fetch
        self._used.add(handoff.transfer_id, now_s=now_s)
        self._control.announce(handoff)

    def match(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many prompt tokens can be fetched beyond the local prefix hit. No side effects; asked every step.

        Returns:
            `(None, False)` while the prefill engine is being connected, `(0, False)` when there is nothing to fetch,
            else `(n, True)`. The last prompt token is computed here in any case, so that alone is not worth a fetch.
        """
        fetch = self._by_request.get(request.request_id)
        if fetch is None or fetch.phase != "announced":
            return 0, False
        if fetch.handoff.num_tokens - num_computed_tokens <= 1:
            return 0, False
        match self._control.peer_phase(fetch.handoff.engine_id):
            case "ready":
                return fetch.handoff.num_tokens - num_computed_tokens, True
            case "failed":
                fetch.refused = self._control.peer_cause(fetch.handoff.engine_id)
                return 0, False
            case _ if time.monotonic() - fetch.announced_s > PAIRING_LIMIT_S:
                fetch.refused = "handshake_timeout"  # the control thread should have said so long ago
                return 0, False
            case _:
                return None, False

    def on_allocated(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """vLLM has given the request its blocks. With tokens to come from outside it is parked now."""
        fetch = self._by_request.get(request.request_id)
        if fetch is None or fetch.phase != "announced":
            return
        if num_external_tokens == 0:
            self._decline(fetch)
            return
        first = (fetch.handoff.num_tokens - num_external_tokens) // self._block_size
        last = -(-fetch.handoff.num_tokens // self._block_size)
        fetch.phase, fetch.parked_s, fetch.num_tokens = "parked", time.monotonic(), num_external_tokens
        fetch.blocks = tuple(tuple(group[first:last]) for group in blocks.get_block_ids())
        remote = tuple(tuple(group[first:last]) for group in fetch.handoff.block_ids)
        self._reads.append(
            ReadJob(
                transfer_id=fetch.handoff.transfer_id,
                engine_id=fetch.handoff.engine_id,
                local_blocks=fetch.blocks,
                remote_blocks=remote,
            )
        )
        self._control.expect(fetch.handoff.transfer_id)

    def take_reads(self) -> tuple[ReadJob, ...]:
        """The reads that begin with this step."""
        reads, self._reads = tuple(self._reads), []
        return reads

    def on_finished(self, request: Request) -> None:
        """The request has ended, for whatever reason. If it was parked vLLM keeps its blocks until it is reported."""
        fetch = self._by_request.get(request.request_id)
        if fetch is None:
            return
        if fetch.phase == "parked":
            fetch.abandoned = True
            self._control.cancel(fetch.handoff.transfer_id)
        else:
            self._control.forget(fetch.handoff.transfer_id)
            self._remove(fetch)

    def take_reports(self) -> list[ReceiveReport]:
        """Parked requests whose fate is now known, each exactly once. Called at the start of every step."""
        reports = []
        for report in self._control.take_reports():
            match report:
                case Settled():
                    reports.extend(self._settle(report))
                case Drained():
                    self._drained(report.transfer_id)
        return reports + self._overdue()

    @property
    def has_work(self) -> bool:
        """Whether `take_reports` has something to do."""
        return self._control.has_reports

    @property
    def num_outstanding(self) -> int:
        """Sets of blocks that will have to be given back."""
        return len(self._draining)

    @property
    def num_followed(self) -> int:
        """Requests that came with a handoff and are not settled, and blocks that are not quiet."""
        return len(self._by_request) + len(self._draining)

    def add_stats(self, stats: TransferStats) -> None:
        """What happened since the last call."""
        stats.aggregate(self._stats)
        self._stats.reset()
        stats.add(self._pairs)
        stats.gauge("vllm_disagg_kv_draining_requests", len(self._draining))

    def _accept(self, request: Request, text: object) -> Handoff:
        handoff = unseal(text, self._key)
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            raise InvalidHandoff("the prompt is not made of token ids alone")
        check_fits(
            handoff,
            token_ids=request.prompt_token_ids,
            salt=prompt_salt(request),
            block_size=self._block_size,
            num_groups=self._num_groups,
        )
        if handoff.transfer_id in self._used:
            raise InvalidHandoff("the handoff was used before: it works once")
        return handoff

    def _decline(self, fetch: _Fetch) -> None:
        """vLLM goes on without our tokens: cached here already, not readable, or not wanted by the request's kind."""
        if fetch.refused:
            self._count_failure(fetch.refused, fetch.handoff.num_tokens)
            logger.warning("transfer.declined request=%s cause=%s: computed here", fetch.request_id, fetch.refused)
        self._control.forget(fetch.handoff.transfer_id)
        self._remove(fetch)

    def _settle(self, settled: Settled) -> list[ReceiveReport]:
        fetch = self._by_transfer.get(settled.transfer_id)
        if fetch is None:
            logger.error("transfer.unknown transfer=%s: dropped", settled.transfer_id)
            if not settled.draining:  # it was overdue and its blocks were kept: no `Drained` follows
                self._drained(settled.transfer_id)
            return []
        self._remove(fetch)
        if settled.draining:
            self._pin(fetch)
        if settled.result == "received":
            self._received(fetch, settled)
        elif not fetch.abandoned:
            self._count_failure(settled.cause, fetch.num_tokens)
            logger.warning("transfer.failed request=%s cause=%s: recomputed here", fetch.request_id, settled.cause)
        return [ReceiveReport(fetch.request_id, ok=settled.result == "received")]

    def _overdue(self) -> list[ReceiveReport]:
        """The last resort against a control thread that does not answer: no request waits for ever."""
        limit_s = time.monotonic() - self._overdue_s
        late = [fetch for fetch in self._by_request.values() if fetch.phase == "parked" and fetch.parked_s < limit_s]
        reports: list[ReceiveReport] = []
        for fetch in late:
            logger.error("transfer.overdue request=%s: its blocks stay out of use", fetch.request_id)
            unsettled = Settled(transfer_id=fetch.handoff.transfer_id, result="failed", cause="overdue", draining=True)
            reports.extend(self._settle(unsettled))
        return reports

    def _received(self, fetch: _Fetch, settled: Settled) -> None:
        seconds = time.monotonic() - fetch.parked_s
        self._stats.observe("vllm_disagg_kv_transfer_seconds", seconds)
        self._stats.observe("vllm_disagg_kv_read_seconds", settled.read_s)
        self._stats.observe("vllm_disagg_kv_transfer_bytes", settled.num_bytes)
        self._stats.observe("vllm_disagg_kv_transfer_descriptors", settled.num_descriptors)
        self._stats.count("vllm_disagg_kv_tokens_received_total", fetch.num_tokens)
        if settled.read_s:
            self._stats.observe("vllm_disagg_kv_read_bytes_per_second", settled.num_bytes / settled.read_s)
        prefill = fetch.handoff.control.removeprefix("tcp://")
        self._pairs.add("vllm_disagg_kv_pair_transfers_total", prefill)
        self._pairs.add("vllm_disagg_kv_pair_bytes_total", prefill, settled.num_bytes)
        self._pairs.add("vllm_disagg_kv_pair_read_seconds_total", prefill, settled.read_s)
        self._pairs.add("vllm_disagg_kv_pair_descriptors_total", prefill, settled.num_descriptors)
        logger.info(
            "transfer.done request=%s tokens=%d bytes=%d descriptors=%d ms=%.1f read_ms=%.1f prove_ms=%.1f",
            fetch.request_id, fetch.num_tokens, settled.num_bytes, settled.num_descriptors,
            1000 * seconds, 1000 * settled.read_s, 1000 * settled.prove_s,
        )  # fmt: skip

    def _count_failure(self, cause: str, num_tokens: int) -> None:
        self._stats.count(_FAILURES, label=cause)
        self._stats.count(_RECOMPUTED, num_tokens, label=cause)

    def _pin(self, fetch: _Fetch) -> None:
        """Keep blocks out of use that a peer may still write to."""
        assert self._pool is not None, "vLLM binds the block pool before the first request"
        self._pool.touch([self._pool.blocks[block] for group in fetch.blocks for block in group])
        self._draining[fetch.handoff.transfer_id] = fetch.blocks

    def _drained(self, transfer_id: TransferId) -> None:
        blocks = self._draining.pop(transfer_id, None)
        if blocks is None or self._pool is None:
            return
        for group in blocks:
            self._pool.free_blocks([self._pool.blocks[block] for block in reversed(group)])

    def _remove(self, fetch: _Fetch) -> None:
        self._by_request.pop(fetch.request_id, None)
        self._by_transfer.pop(fetch.handoff.transfer_id, None)
