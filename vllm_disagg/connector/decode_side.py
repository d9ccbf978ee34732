"""The scheduler half on a decode instance: which requests wait for KV, into which blocks it comes, and what became
of it. One owner for every parked request: it is reported to vLLM exactly once.

There are two ways for KV to come in. A request is fetched on arrival where that can be, into blocks that become its own
when vLLM's scheduler first looks at it (`early`). Any other is given blocks first, and waits for its KV parked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vllm_disagg.connector.control_client import DecodeControl
from vllm_disagg.connector.early import EarlyFetches, free_blocks
from vllm_disagg.connector.fetch import Fetch, Handoffs
from vllm_disagg.connector.messages import BeginRead
from vllm_disagg.connector.peers import CONNECT_TIMEOUT_S, HELLO_TIMEOUT_S
from vllm_disagg.connector.pull import Drained, Settled
from vllm_disagg.connector.request_facts import is_rejection_notice, kv_params, was_aborted
from vllm_disagg.connector.reserve import GrowthOutlook, Reserve
from vllm_disagg.connector.stats import TransferStats
from vllm_disagg.connector.tally import Tally
from vllm_disagg.core.lifetime import DECODE, ENDS, Lives, State
from vllm_disagg.core.types import BlockIds, TransferId
from vllm_disagg.errors import InvalidHandoff

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

Outlook = Literal["fetch", "here", "unknown", "local"]
"""Of a waiting request: its KV would be fetched, is here, will show, or is computed here."""

PAIRING_LIMIT_S = HELLO_TIMEOUT_S + CONNECT_TIMEOUT_S + 5.0
"""How long a request may wait for its prefill engine to be connected, whatever the control thread does."""

_FAILURES = "vllm_disagg_kv_failures_total"
_RECOMPUTED = "vllm_disagg_kv_recomputed_tokens_total"


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
        overdue_s: a request that the control thread has not settled after this is failed without it.
        reserve: blocks for early KV; None to fetch nothing early.
    """

    def __init__(
        self,
        *,
        control: DecodeControl,
        key: bytes,
        block_size: int,
        num_groups: int,
        overdue_s: float,
        reserve: Reserve | None = None,
    ) -> None:
        self._control, self._overdue_s, self._block_size = control, overdue_s, block_size
        self._handoffs = Handoffs(key=key, block_size=block_size, num_groups=num_groups)
        self._lives = Lives(DECODE)
        self._early = EarlyFetches(
            control=control,
            handoffs=self._handoffs,
            lives=self._lives,
            reserve=reserve if num_groups == 1 else None,
        )
        self._by_request: dict[str, Fetch] = {}
        self._adopted: list[Fetch] = []
        """Of these, those that came early; see `_early_ones`."""
        self._pulling: dict[TransferId, Fetch] = {}
        """Those that the control thread has not settled, also where the request has gone."""
        self._received: dict[str, Fetch] = {}
        self._reads: list[BeginRead] = []
        self._draining: dict[TransferId, BlockIds] = {}
        self._pool: BlockPool | None = None
        self._stats = TransferStats()
        self._pairs = Tally()

    def bind_block_pool(self, pool: BlockPool) -> None:
        """vLLM's block pool, once it exists."""
        self._pool = pool
        self._early.bind_block_pool(pool)

    def on_arrival(self, request: Request) -> None:
        """The request has come in while a step is running. On any thread, before vLLM's main thread hears of it."""
        self._early.on_arrival(request)

    def on_idle_arrival(self, request: Request) -> None:
        """The request has come to an engine that computes nothing and has room for it. On vLLM's main thread, before
        `on_new_request`."""
        self._early.on_idle_arrival(request)

    def on_new_request(self, request: Request) -> None:
        """Check the handoff and get ready to fetch. Whatever is wrong with it costs a local prefill, nothing else."""
        params = kv_params(request)
        if not params.get("do_remote_prefill"):
            return
        self._adopt_arrived()
        if (known := self._by_request.get(request.request_id)) is not None:
            known.claimed = True
            return
        try:
            handoff = self._handoffs.accepted(request, params.get("handoff"))
        except InvalidHandoff as refusal:
            if is_rejection_notice(request):
                self._let_go(params.get("handoff"))
                return
            logger.warning("handoff.refused request=%s reason=%s", request.request_id, refusal)
            self._lives.begin("refused")
            self._count_failure(refusal.cause, request.num_prompt_tokens)
            return
        now_s = time.monotonic()
        self._by_request[request.request_id] = Fetch(
            request_id=request.request_id, handoff=handoff, state=self._lives.begin("accepted"), announced_s=now_s
        )
        self._control.announce(handoff)

    def awaits_early(self, request: Request) -> bool:
        """Whether its KV is on its way already, and whoever sleeps is woken when it has come."""
        fetch = self._by_request.get(request.request_id)
        return fetch is not None and fetch.early and fetch.settled is None

    def match(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many prompt tokens can be fetched beyond the local prefix hit. No side effects; asked every step.

        Returns:
            `(None, False)` while the prefill engine is being connected or an early fetch is under way, `(0, False)`
            when there is nothing to fetch, `(n, False)` when n tokens are here already, else `(n, True)`. The last
            prompt token is computed here in any case, so that alone is not worth a fetch.
        """
        fetch = self._by_request.get(request.request_id)
        if fetch is not None and fetch.early:
            return self._early.match(fetch, num_computed_tokens), False
        if fetch is None or fetch.state is not State.QUEUED_ON_DECODE:
            return 0, False
        if fetch.handoff.num_tokens - num_computed_tokens <= 1:
            return 0, False
        phase, cause = self._control.readiness(fetch.handoff)
        match phase:
            case "ready":
                return fetch.handoff.num_tokens - num_computed_tokens, True
            case "failed":
                fetch.refused = cause
                return 0, False
            case _ if time.monotonic() - fetch.announced_s > PAIRING_LIMIT_S:
                fetch.refused = "handshake_timeout"  # the control thread should have said so long ago
                return 0, False
            case _:
                return None, False

    def outlook(self, request: Request) -> Outlook:
        """What `match` will probably say when the request's turn comes. Changes nothing."""
        fetch = self._by_request.get(request.request_id)
        if fetch is not None and fetch.early:
            return "unknown" if fetch.settled is None else "local" if fetch.refused else "here"
        if fetch is None or fetch.state is not State.QUEUED_ON_DECODE:
            return "local"
        match self._control.readiness(fetch.handoff)[0]:
            case "ready":
                return "fetch" if fetch.handoff.num_tokens > 1 else "local"
            case "failed":
                return "local"
            case _:
                return "unknown"

    def on_allocated(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """vLLM has given the request its blocks. With tokens to come from outside it is parked now."""
        fetch = self._by_request.get(request.request_id)
        if fetch is None or not (fetch.early or fetch.state is State.QUEUED_ON_DECODE):
            return
        if num_external_tokens == 0:
            self._decline(fetch)
            return
        if fetch.early:
            self._landed(fetch, num_external_tokens)
            return
        first = (fetch.handoff.num_tokens - num_external_tokens) // self._block_size
        last = fetch.handoff.num_blocks(self._block_size)
        fetch.state = self._lives.step(fetch.state, "reserved")
        fetch.parked_s, fetch.num_tokens = time.monotonic(), num_external_tokens
        self._pulling[fetch.handoff.transfer_id] = fetch
        fetch.blocks = tuple(tuple(group[first:last]) for group in blocks.get_block_ids())
        remote = tuple(tuple(group[first:last]) for group in fetch.handoff.block_ids)
        self._reads.append(
            BeginRead(
                transfer_id=fetch.handoff.transfer_id,
                engine_id=fetch.handoff.engine_id,
                local_blocks=fetch.blocks,
                remote_blocks=remote,
                verify=self._handoffs.to_verify(fetch.handoff, fetch.blocks, first),
            )
        )
        self._control.expect(fetch.handoff.transfer_id, first_block=first)

    def lend(self, request: Request, num_local_tokens: int) -> bool:
        """vLLM is about to give this request its blocks: see to it that those with its early KV come first.

        Args:
            request: any request.
            num_local_tokens: its tokens that vLLM's own prefix cache holds.

        Returns:
            Whether it has early KV. Then `lent` tells how it went, before anything else takes blocks.
        """
        fetch = self._by_request.get(request.request_id)
        return fetch is not None and fetch.early and self._early.lend(fetch, num_local_tokens)

    def lent(self, request: Request, block_ids: tuple[list[int], ...] | None) -> bool:
        """These are the request's blocks now; None for none yet, and its early KV is kept. False: they are not the
        ones that hold its KV, which is lost."""
        return self._early.lent(self._by_request[request.request_id], block_ids)

    def before_step(self, *, num_running: int, outlook: GrowthOutlook) -> None:
        """Called at the start of every step, after `take_reports`: keep the reserve as large as it should be."""
        self._early.before_step(num_running=num_running, outlook=outlook, num_early=len(self._early_ones()))

    def take_reads(self) -> tuple[BeginRead, ...]:
        """The reads that begin with this step."""
        reads, self._reads = tuple(self._reads), []
        return reads

    def on_scheduled(self, scheduled: Collection[str], preempted: Collection[str]) -> None:
        """What this step computes, and which requests lost their blocks for it."""
        for request_id in [request_id for request_id in self._received if request_id in scheduled]:
            fetch = self._received.pop(request_id)
            fetch.state = self._lives.step(fetch.state, "scheduled")
        for request_id in preempted:
            lost = self._by_request.get(request_id)
            if lost is not None and lost.state is State.RUNNING:
                lost.state = self._lives.step(lost.state, "preempted")
                del self._by_request[request_id]

    def on_finished(self, request: Request) -> None:
        """The request has ended, for whatever reason. If it was parked vLLM keeps its blocks until it is reported."""
        fetch = self._by_request.pop(request.request_id, None)
        if fetch is None:
            return
        before = fetch.state
        if before not in ENDS:
            left = was_aborted(request) or before is not State.RUNNING
            fetch.state = self._lives.step(before, "client_left" if left else "finished")
        self._received.pop(request.request_id, None)
        if before is State.RECEIVING:
            self._control.cancel(fetch.handoff.transfer_id)
        elif before is State.QUEUED_ON_DECODE:
            self._control.forget(fetch.handoff.transfer_id)
        elif fetch.settled is not None:
            self._early.give_back(fetch)

    def take_reports(self) -> list[ReceiveReport]:
        """Parked requests whose fate is now known, each exactly once. Called at the start of every step."""
        reports = []
        told = self._control.take_reports()
        self._adopt_arrived()  # after `told`: a fetch is noted before it begins
        for report in told:
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

    def num_early_blocks(self, request: Request) -> int:
        """Blocks with this request's own early KV: not free, but its own as soon as it is admitted."""
        fetch = self._by_request.get(request.request_id)
        return sum(map(len, fetch.blocks)) if fetch is not None and fetch.early else 0

    @property
    def num_kept_blocks(self) -> int:
        """Cached blocks that early fetches keep from eviction, and nobody else uses."""
        return self._early.num_kept

    @property
    def num_followed(self) -> int:
        """Requests that came with a handoff and use its KV, and blocks that are not settled or not quiet."""
        gone = sum(fetch.request_id not in self._by_request for fetch in self._pulling.values())
        return self._early.num_arrived + len(self._by_request) + gone + len(self._draining)

    def add_stats(self, stats: TransferStats) -> None:
        """What happened since the last call."""
        stats.aggregate(self._stats)
        self._stats.reset()
        stats.add(self._pairs)
        stats.transitions(self._lives.take())
        stats.gauge("vllm_disagg_kv_draining_requests", len(self._draining))

    def _let_go(self, text: object) -> None:
        """A request with this handoff never reached the engine, or has just left it: give its KV back, unless it was
        here, when its own end does that."""
        handoff = self._handoffs.unused(text)
        if handoff is not None:
            self._control.announce(handoff)
            self._control.forget(handoff.transfer_id)

    def _adopt_arrived(self) -> None:
        for fetch in self._early.take_arrived():
            self._by_request[fetch.request_id] = self._pulling[fetch.handoff.transfer_id] = fetch
            self._adopted.append(fetch)

    def _early_ones(self) -> list[Fetch]:
        """Requests whose KV comes, or lies, in blocks that are not theirs yet. Asked in each step: of all who have a
        handoff, which may be as many as run, these are few."""
        known = self._by_request
        self._adopted = [item for item in self._adopted if item.early and known.get(item.request_id) is item]
        return self._adopted

    def _landed(self, fetch: Fetch, num_external_tokens: int) -> None:
        """Its blocks hold its KV, and are the request's now (`lent`)."""
        assert fetch.settled is not None and not fetch.blocks
        fetch.early = False
        fetch.num_tokens = num_external_tokens + 1  # the last one has come too
        self._stats.count("vllm_disagg_kv_early_reads_total")
        self._note_received(fetch, fetch.settled)

    def _decline(self, fetch: Fetch) -> None:
        """vLLM goes on without our tokens: cached here already, not readable, or not wanted by the request's kind."""
        before = fetch.state
        if before not in ENDS:  # else its early read has failed
            fetch.state = self._lives.step(before, "declined" if fetch.refused else "not_needed")
        if fetch.refused:
            self._count_failure(fetch.refused, fetch.handoff.num_tokens)
            logger.warning("transfer.declined request=%s cause=%s: computed here", fetch.request_id, fetch.refused)
        if before is State.QUEUED_ON_DECODE:
            self._control.forget(fetch.handoff.transfer_id)
        elif before is State.RECEIVING:  # vLLM did not wait: its blocks come back when the read is over
            self._control.cancel(fetch.handoff.transfer_id)
        else:
            self._early.give_back(fetch)
            fetch.early = False
        self._received.pop(fetch.request_id, None)
        if fetch.state is not State.RUNNING:
            del self._by_request[fetch.request_id]

    def _settle_early(self, fetch: Fetch, settled: Settled) -> None:
        fetch.settled = settled
        if settled.draining:
            self._draining[settled.transfer_id] = self._early.withdraw(fetch)
        if fetch.state is not State.RECEIVING:  # the request has gone, or goes on without it
            self._early.give_back(fetch)
            fetch.early = False
            return
        fetch.state = self._lives.step(fetch.state, _event_of(settled))
        if settled.result == "received":
            self._received[fetch.request_id] = fetch
        else:
            fetch.refused = settled.cause
            self._early.give_back(fetch)

    def _settle(self, settled: Settled) -> list[ReceiveReport]:
        fetch = self._pulling.pop(settled.transfer_id, None)
        if fetch is None:
            logger.error("transfer.unknown transfer=%s: dropped", settled.transfer_id)
            if not settled.draining:  # it was overdue and its blocks were kept: no `Drained` follows
                self._drained(settled.transfer_id)
            return []
        if fetch.early:
            self._settle_early(fetch, settled)
            return []
        if settled.draining:
            self._pin(fetch)
        ok = settled.result == "received"
        if fetch.state is State.RECEIVING:  # its client has not left
            fetch.state = self._lives.step(fetch.state, _event_of(settled))
            if ok:
                self._received[fetch.request_id] = fetch
            else:
                del self._by_request[fetch.request_id]
                self._count_failure(settled.cause or "transport", fetch.num_tokens)
                logger.warning("transfer.failed request=%s cause=%s: recomputed here", fetch.request_id, settled.cause)
        if ok:
            self._note_received(fetch, settled)
        return [ReceiveReport(fetch.request_id, ok=ok)]

    def _overdue(self) -> list[ReceiveReport]:
        """The last resort against a control thread that does not answer: no request waits for ever."""
        limit_s = time.monotonic() - self._overdue_s
        late = [fetch for fetch in self._pulling.values() if fetch.parked_s < limit_s]
        reports: list[ReceiveReport] = []
        for fetch in late:
            logger.error("transfer.overdue request=%s: its blocks stay out of use", fetch.request_id)
            unsettled = Settled(transfer_id=fetch.handoff.transfer_id, result="failed", cause="overdue", draining=True)
            reports.extend(self._settle(unsettled))
        lost = [
            fetch for fetch in self._early_ones() if fetch.settled and not fetch.claimed and fetch.parked_s < limit_s
        ]
        for fetch in lost:  # vLLM has lost the request on its way to the main thread
            if fetch.state not in ENDS:
                fetch.state = self._lives.step(fetch.state, "client_left")
            self._early.give_back(fetch)
            self._received.pop(fetch.request_id, None)
            del self._by_request[fetch.request_id]
        return reports

    def _note_received(self, fetch: Fetch, settled: Settled) -> None:
        seconds = (settled.at_s or time.monotonic()) - fetch.parked_s
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

    def _pin(self, fetch: Fetch) -> None:
        """Keep blocks out of use that a peer may still write to."""
        assert self._pool is not None, "vLLM binds the block pool before the first request"
        self._pool.touch([self._pool.blocks[block] for group in fetch.blocks for block in group])
        self._draining[fetch.handoff.transfer_id] = fetch.blocks

    def _drained(self, transfer_id: TransferId) -> None:
        blocks = self._draining.pop(transfer_id, None)
        if blocks is None or self._pool is None:
            return
        free_blocks(self._pool, blocks)


def _event_of(settled: Settled) -> str:
    """What a pull's end is in the request's life."""
    if settled.result == "received":
        return "proven"
    return "lease_expired" if settled.cause == "lease_expired" else "failed"
