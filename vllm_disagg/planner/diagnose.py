"""What presses a running engine, read from its own metrics over a window; nothing is installed in it.

A pure function over two scrapes and the gauges between them. Findings are ordered by how much they explain, each with
the figures it rests on and what to look at first. Thresholds are constants below: they say where to look, not what is
true.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

Phase = Literal["prefill", "decode", "memory", "none"]

FEW_REQUESTS: Final = 20
"""Finished requests in a window below which nothing is said."""

QUEUE_SHARE: Final = 0.3
"""Of the mean TTFT: so much waiting for the first step makes the queue the cause."""

STUTTER: Final = 3.0
"""The 99th percentile of the time between tokens over the median. A step with a prompt in it is so much longer."""

LONG_PROMPT: Final = 256
"""Mean prompt tokens from which on prompts are taken for the cause of stutter."""

KV_FULL: Final = 0.9
KV_IDLE_DEVICE: Final = 16
"""With a full KV cache fewer running requests than this leave a device's compute idle while decoding."""

LOW_HITS: Final = 0.1
GROWS: Final = 1.5
"""Requests under way at the window's end over those at its beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """What a Prometheus histogram counted in the window.

    Args:
        bounds: upper bounds of its buckets, the last infinite.
        counts: observations in each bucket, not cumulative.
        total: the sum of all observations.
    """

    bounds: tuple[float, ...] = ()
    counts: tuple[float, ...] = ()
    total: float = 0.0

    @property
    def num(self) -> float:
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """NaN without observations."""
        return self.total / self.num if self.num else math.nan

    def quantile(self, share: float) -> float:
        """Linear within its bucket, as Prometheus does; an infinite one's lower bound. NaN without observations."""
        if not self.num:
            return math.nan
        wanted, below, low = share * self.num, 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if below + count >= wanted and count:
                return low if math.isinf(bound) else low + (bound - low) * (wanted - below) / count
            below, low = below + count, bound
        return low


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One engine, observed for a while.

    Args:
        seconds: how long.
        histograms: by the metric's name without `vllm:`.
        counters: growth, likewise.
        running, waiting, kv_usage: each time it was looked at: requests in the batch, requests in the queue, share of
            the KV cache in use.
    """

    seconds: float
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    counters: Mapping[str, float] = field(default_factory=dict)
    running: Sequence[float] = ()
    waiting: Sequence[float] = ()
    kv_usage: Sequence[float] = ()

    def of(self, name: str) -> Histogram:
        """A histogram; an empty one where the engine has none of that name."""
        return self.histograms.get(name, Histogram())

    def count(self, name: str) -> float:
        return self.counters.get(name, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that presses.

    Args:
        name: short, stable.
        phase: which phase it belongs to.
        said: what was seen, with its figures.
        look_at: what to change or measure first.
        splitting: what dividing the phases would do about it.
    """

    name: str
    phase: Phase
    said: str
    look_at: str
    splitting: str


def diagnose(window: Window) -> list[Finding]:
    """Findings, the most telling first; one that says `quiet` or `too_few` where there is nothing to find."""
    ttft, itl = window.of("time_to_first_token_seconds"), window.of("inter_token_latency_seconds")
    if ttft.num < FEW_REQUESTS:
        return [
            Finding(
                name="too_few", phase="none",
                said=f"{ttft.num:.0f} requests got a first token in {window.seconds:.0f} s: too few to tell",
                look_at="watch for longer (--window-s), or at a busier time", splitting="",
            )
        ]  # fmt: skip
    found = [
        *_overload(window),
        *_prefill_queue(window, ttft),
        *_stutter(window, itl),
        *_memory(window),
        *_prefixes(window),
    ]
    if found:
        return found
    return [
        Finding(
            name="quiet", phase="none",
            said=f"TTFT {_ms(ttft.quantile(0.5))} at the median and {_ms(ttft.quantile(0.9))} at p90, time between "
            f"tokens {_ms(itl.quantile(0.5))} and {_ms(itl.quantile(0.99))} at p99; nothing queues or stutters",
            look_at="nothing, unless these figures miss your targets",
            splitting="would gain little at this load; `vllm-disagg plan` tells for a higher one",
        )
    ]  # fmt: skip


def _overload(window: Window) -> list[Finding]:
    under_way = [a + b for a, b in zip(window.running, window.waiting, strict=False)]
    fifth = len(under_way) // 5
    if not fifth:
        return []
    first, last = sum(under_way[:fifth]) / fifth, sum(under_way[-fifth:]) / fifth
    waiting = sum(window.waiting[-fifth:]) / fifth
    if last < GROWS * max(first, 1.0) or waiting < 1:
        return []
    return [
        Finding(
            name="overload", phase="none",
            said=f"requests under way grew from {first:.0f} to {last:.0f}, {waiting:.0f} of them waiting: more "
            "come than leave",
            look_at="add instances or shed load before anything else; latencies of a growing queue say nothing",
            splitting="does not help a system that is short of devices",
        )
    ]  # fmt: skip


def _prefill_queue(window: Window, ttft: Histogram) -> list[Finding]:
    queue = window.of("request_queue_time_seconds")
    share = queue.mean / ttft.mean if ttft.mean > 0 else math.nan
    if not share > QUEUE_SHARE:
        return []
    prompt = window.of("request_prompt_tokens")
    return [
        Finding(
            name="prefill_queue", phase="prefill",
            said=f"{share:.0%} of a mean TTFT of {_ms(ttft.mean)} is waiting for the first step; prompts have "
            f"{prompt.mean:.0f} tokens on average and {prompt.quantile(0.9):.0f} at p90",
            look_at="--max-num-batched-tokens: a larger budget computes waiting prompts sooner, at the cost of the "
            "time between tokens; a larger prefix cache where prompts repeat",
            splitting="gives prompts devices of their own: plan how many with the trace of these lengths",
        )
    ]  # fmt: skip


def _stutter(window: Window, itl: Histogram) -> list[Finding]:
    median, tail, prompt = itl.quantile(0.5), itl.quantile(0.99), window.of("request_prompt_tokens").mean
    if not (tail > STUTTER * median and prompt >= LONG_PROMPT):
        return []
    return [
        Finding(
            name="interference", phase="decode",
            said=f"the time between tokens is {_ms(median)} at the median and {_ms(tail)} at p99, {tail / median:.1f} "
            f"times as long, with prompts of {prompt:.0f} tokens on average: streams stutter beside prompts",
            look_at="--max-num-batched-tokens: smaller chunks bound the longest step, at the cost of TTFT. If TTFT has "
            "room for that, chunked prefill is enough",
            splitting="takes prompts out of these steps; worth it where smaller chunks would miss the TTFT target",
        )
    ]  # fmt: skip


def _memory(window: Window) -> list[Finding]:
    if not window.kv_usage:
        return []
    usage, running = sum(window.kv_usage) / len(window.kv_usage), sum(window.running) / max(len(window.running), 1)
    preempted = window.count("num_preemptions")
    waiting = sum(window.waiting) / max(len(window.waiting), 1)
    if not (preempted > 0 or (usage > KV_FULL and waiting > 0)):
        return []
    idle = running < KV_IDLE_DEVICE
    return [
        Finding(
            name="kv_full", phase="memory",
            said=f"the KV cache is {usage:.0%} full with {running:.0f} requests running and {waiting:.0f} waiting, "
            f"{preempted:.0f} lost their blocks" + ("; so few leave the device's compute idle" if idle else ""),
            look_at="KV memory: --gpu-memory-utilization, a smaller KV dtype, tensor parallelism; --max-num-seqs if "
            "preemptions cost more than waiting",
            splitting="helps a little, since prompts that wait for decode stay on prefill; it also holds the weights "
            "twice",
        )
    ]  # fmt: skip


def _prefixes(window: Window) -> list[Finding]:
    asked, hits = window.count("prefix_cache_queries"), window.count("prefix_cache_hits")
    prompt, output = window.of("request_prompt_tokens").mean, window.of("request_generation_tokens").mean
    if not (asked > 0 and hits / asked < LOW_HITS and prompt > 4 * output and prompt >= 4 * LONG_PROMPT):
        return []
    return [
        Finding(
            name="prefix_reuse", phase="prefill",
            said=f"prompts of {prompt:.0f} tokens for answers of {output:.0f}, and {hits / asked:.0%} of their tokens "
            "were found in the prefix cache",
            look_at="whether they are turns of conversations: then send a conversation to the same instance, put what "
            "repeats first in the prompt, and give the cache room",
            splitting="moves this work to other devices; reuse would remove it",
        )
    ]  # fmt: skip


def _ms(seconds: float) -> str:
    return "unknown" if math.isnan(seconds) else f"{seconds * 1e3:.0f} ms"
