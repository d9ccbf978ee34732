"""The engines behind the proxy: what is known of each, what it has in hand, and which ones fit together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from vllm_disagg.config import ProxySettings, Role
from vllm_disagg.core.fingerprint import Fingerprint, check_compatible
from vllm_disagg.core.policy import Decision, Load, decide, least_loaded
from vllm_disagg.errors import IncompatiblePeer
from vllm_disagg.proxy.metrics import ProxyMetrics

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False, kw_only=True)
class Instance:
    """One engine. Only `Pool` changes it.

    Attributes:
        role: the list it was given in.
        index: its place in that list, its name towards clients and in metrics.
        url: where it listens, for logs and requests only.
        up: whether it may be given new requests.
        verdict: what the last look at it said; logged when it changes.
        fingerprint: what its KV cache is like; None when it does not say.
        num_tokens: prompt tokens of its outstanding requests.
        num_requests: its outstanding requests.
        last_chosen: when it was last chosen, as a growing number.
        strikes: health probes in a row that timed out, with nothing heard from it in between.
        num_ups: how often it has appeared: another number may mean another run of the engine.
        num_downs: how often it was declared down; an exchange from before such a moment is over.
        clocks: deadlines of the reads that are waiting for it, brought forward when it is declared down.
        nudged: set when its next probe should not wait.
    """

    role: Role
    index: int
    url: str
    up: bool = False
    verdict: str = ""
    fingerprint: Fingerprint | None = None
    num_tokens: int = 0
    num_requests: int = 0
    last_chosen: int = 0
    strikes: int = 0
    num_ups: int = 0
    num_downs: int = 0
    clocks: set[asyncio.Timeout] = field(default_factory=set)
    nudged: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def load(self) -> Load:
        """What `core.policy` needs to know of it."""
        return Load(
            index=self.index,
            num_tokens=self.num_tokens,
            num_requests=self.num_requests,
            last_chosen=self.last_chosen,
        )


class Pool:
    """All engines, and the state that decisions are made from."""

    def __init__(self, settings: ProxySettings, metrics: ProxyMetrics) -> None:
        self.prefill = [Instance(role="prefill", index=i, url=url) for i, url in enumerate(settings.prefill)]
        self.decode = [Instance(role="decode", index=i, url=url) for i, url in enumerate(settings.decode)]
        self._metrics = metrics
        self._misfits: dict[tuple[int, int], str] = {}
        self._choices = 0
        self.appeared = asyncio.Event()
        """Set when an engine has (re)appeared; whoever waits for it clears it."""
        for instance in self.all:
            metrics.instance_up(instance.role, instance.index, False)
            metrics.outstanding(instance.role, instance.index, 0)

    @property
    def all(self) -> list[Instance]:
        """Every engine, of both roles."""
        return [*self.prefill, *self.decode]

    def decide(self, *, shape: str | None, short: bool) -> Decision:
        """Where a request goes now. See `core.policy.decide`."""
        return decide(shape=shape, short=short, prefill=_up(self.prefill), decode=_up(self.decode), fits=self.fits)

    def fits(self, prefill: int, decode: int) -> bool:
        """Whether these two can exchange KV: both say what theirs is like, and it is alike."""
        known = self.prefill[prefill].fingerprint is not None and self.decode[decode].fingerprint is not None
        return known and (prefill, decode) not in self._misfits

    @property
    def can_split(self) -> bool:
        """Whether a request could be split now."""
        return self.decide(shape=None, short=False).route == "split"

    def another_prefill(self, tried: Collection[Instance], *, decode: Instance) -> Instance | None:
        """A prefill instance to try after others have failed."""
        others = [p for p in self.prefill if p.up and p not in tried and self.fits(p.index, decode.index)]
        return self._best(others)

    def another_decode(self, tried: Collection[Instance], *, prefill: Instance | None = None) -> Instance | None:
        """A decode instance to try after others have failed: one that fits `prefill` if it is given."""
        others = [d for d in self.decode if d.up and d not in tried]
        if prefill is not None:
            others = [d for d in others if self.fits(prefill.index, d.index)]
        return self._best(others)

    def stand_in(self) -> Instance | None:
        """A prefill instance to serve whole requests; None while a decode instance is up."""
        return None if any(d.up for d in self.decode) else self._best([p for p in self.prefill if p.up])

    @property
    def can_serve(self) -> bool:
        """Whether a request would be served now, and not only since nobody has looked at the decode instances yet."""
        known = any(d.up for d in self.decode) or all(d.verdict for d in self.decode)
        return known and self.decide(shape=None, short=False).route != "refuse"

    @contextmanager
    def carrying(self, instance: Instance, num_tokens: int) -> Iterator[None]:
        """Count a request as outstanding on an instance."""
        self._choices += 1
        instance.last_chosen = self._choices
        self._carry(instance, num_tokens, 1)
        try:
            yield
        finally:
            self._carry(instance, -num_tokens, -1)

    def bring_up(self, instance: Instance, fingerprint: Fingerprint | None) -> None:
        """An engine has (re)appeared and may be given requests."""
        instance.fingerprint, instance.up, instance.strikes = fingerprint, True, 0
        instance.num_ups += 1
        self._metrics.instance_up(instance.role, instance.index, True)
        self._match()
        self.appeared.set()

    def suspect(self, instance: Instance) -> None:
        """A connection to it failed: nothing new for it until a probe, made at once, has found it alive."""
        instance.nudged.set()
        self._take_out(instance, "suspected after a failed connection")

    def declare_down(self, instance: Instance, verdict: str) -> None:
        """A probe found it dead: whatever still waits for it is told so."""
        instance.num_downs += 1
        now_s = asyncio.get_running_loop().time()
        for clock in instance.clocks:
            if not clock.expired():  # else it is ending of itself in this very moment
                clock.reschedule(now_s)
        self._take_out(instance, verdict)

    def note(self, instance: Instance, verdict: str, *, level: int = logging.INFO) -> None:
        """Log what is known of an instance, when that has changed."""
        if verdict != instance.verdict:
            instance.verdict = verdict
            logger.log(level, "instance.state role=%s url=%s state=%s", instance.role, instance.url, verdict)

    def _take_out(self, instance: Instance, verdict: str) -> None:
        self.note(instance, verdict, level=logging.WARNING)
        instance.up = False
        self._metrics.instance_up(instance.role, instance.index, False)

    def _best(self, instances: Sequence[Instance]) -> Instance | None:
        index = least_loaded([instance.load for instance in instances])
        return next((instance for instance in instances if instance.index == index), None)

    def _carry(self, instance: Instance, num_tokens: int, num_requests: int) -> None:
        instance.num_tokens += num_tokens
        instance.num_requests += num_requests
        self._metrics.outstanding(instance.role, instance.index, instance.num_tokens)

    def _match(self) -> None:
        """Compare all pairs again. A new mismatch is logged once."""
        before, self._misfits = self._misfits, {}
        for prefill in self.prefill:
            for decode in self.decode:
                if (why := _misfit(prefill.fingerprint, decode.fingerprint)) is not None:
                    pair = prefill.index, decode.index
                    self._misfits[pair] = why
                    if before.get(pair) != why:
                        logger.error("pair.incompatible prefill=%s decode=%s why=%s", prefill.url, decode.url, why)
        self._metrics.incompatible_pairs(len(self._misfits))


def _up(instances: Sequence[Instance]) -> list[Load]:
    return [instance.load for instance in instances if instance.up]


def _misfit(prefill: Fingerprint | None, decode: Fingerprint | None) -> str | None:
    """Why these two cannot exchange KV. Only factors that both of them name are compared."""
    if prefill is None or decode is None:
        return None
    common = prefill.keys() & decode.keys()
    try:
        check_compatible(
            {name: value for name, value in prefill.items() if name in common},
            {name: value for name, value in decode.items() if name in common},
        )
    except IncompatiblePeer as error:
        return str(error)
    return None
