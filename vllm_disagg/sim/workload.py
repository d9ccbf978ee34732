"""Which requests come, when, and how long they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_disagg.errors import ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NO_INTS: Ints = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefixes:
    """Beginnings of prompts that several requests share, in chunks of equal length.

    Args:
        chunk_tokens: tokens of a chunk.
        offsets: request `r` begins with the chunks `ids[offsets[r]:offsets[r + 1]]`; one entry more than requests.
        ids: chunk numbers from 0 on. Equal numbers at the beginning mean equal tokens.
    """

    chunk_tokens: int
    offsets: Ints
    ids: Ints

    @property
    def num_chunks(self) -> int:
        """How many different chunks there are."""
        return int(self.ids.max()) + 1 if len(self.ids) else 0

    def of(self, request: int) -> Ints:
        """The chunks of one request."""
        return self.ids[self.offsets[request] : self.offsets[request + 1]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """Requests in the order of their arrival.

    Args:
        arrival_s: when each arrives, from 0 on, never falling.
        prompt_tokens, output_tokens: lengths, at least 1.
        rate: nominal requests per second; what `at_rate` scales by. The realised rate differs by chance.
        source: where it comes from, for reports; says so when it is a surrogate.
        prefixes: shared beginnings; None without any.
        max_tokens: what each request allows its answer at most; None where nobody says, as for chats.

    Raises:
        ConfigError: it has no requests, the arrays disagree, or a value is out of range.
    """

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    rate: float
    source: str
    prefixes: Prefixes | None = field(default=None)
    max_tokens: Ints | None = field(default=None)

    def __post_init__(self) -> None:
        num = len(self.arrival_s)
        if num == 0:
            raise ConfigError(f"{self.source}: the workload has no requests")
        if len(self.prompt_tokens) != num or len(self.output_tokens) != num:
            raise ConfigError(f"{self.source}: {num} arrivals, but lengths of {len(self.prompt_tokens)} requests")
        if not np.all(np.isfinite(self.arrival_s)) or self.arrival_s[0] < 0 or np.any(np.diff(self.arrival_s) < 0):
            raise ConfigError(f"{self.source}: arrival times must be finite, from 0 on, and never fall")
        if self.prompt_tokens.min() < 1 or self.output_tokens.min() < 1:
            raise ConfigError(f"{self.source}: every prompt and every output needs at least 1 token")
        if not (np.isfinite(self.rate) and self.rate > 0):
            raise ConfigError(f"{self.source}: the rate must be a positive number, not {self.rate!r}")
        if self.max_tokens is not None and (
            len(self.max_tokens) != num or np.any(self.max_tokens < self.output_tokens)
        ):
            raise ConfigError(f"{self.source}: max_tokens must be given for each request, and not below its output")
        if self.prefixes is not None:
            _check_prefixes(self.prefixes, self.prompt_tokens, self.source)

    def __len__(self) -> int:
        return len(self.arrival_s)

    def at_rate(self, rate: float) -> Workload:
        """The same requests in the same order, faster or slower: common random numbers for a search over rates.

        Raises:
            ConfigError: the rate is not a positive number.
        """
        if not (np.isfinite(rate) and rate > 0):
            raise ConfigError(f"the rate must be a positive number, not {rate!r}")
        return replace(self, arrival_s=self.arrival_s * (self.rate / rate), rate=rate)

    def paced(self, rate: float) -> Workload:
        """As `at_rate`, with the rate realised exactly: the last of n requests comes at n / rate, as in vLLM's
        benchmark. It takes from a finite run the chance of the whole rate, and leaves that of the pattern."""
        last_s = float(self.arrival_s[-1])
        if last_s <= 0:
            return self.at_rate(rate)
        return replace(self, arrival_s=self.arrival_s * (len(self) / rate / last_s), rate=rate)

    def head(self, num_requests: int) -> Workload:
        """Its first requests."""
        return self._taken(np.arange(min(num_requests, len(self))))

    def with_output(self, tokens: int) -> Workload:
        """The same prompts, each with so many tokens of output."""
        most = None if self.max_tokens is None else np.maximum(self.max_tokens, tokens)
        return replace(self, output_tokens=np.full(len(self), tokens, dtype=np.int64), max_tokens=most)

    def capped(self, max_model_len: int) -> Workload:
        """Without the requests that no engine of this context length would take."""
        fits = np.flatnonzero(self.prompt_tokens + self.output_tokens <= max_model_len)
        if len(fits) == 0:
            raise ConfigError(f"{self.source}: no request fits {max_model_len} tokens")
        return self if len(fits) == len(self) else self._taken(fits)

    def _taken(self, index: Ints) -> Workload:
        """The chosen requests, their arrivals as they are. The nominal rate falls with the share that is left."""
        last = int(index[-1])
        share = len(index) / (last + 1)
        return replace(
            self,
            arrival_s=self.arrival_s[index],
            prompt_tokens=self.prompt_tokens[index],
            output_tokens=self.output_tokens[index],
            max_tokens=None if self.max_tokens is None else self.max_tokens[index],
            rate=self.rate * share,
            prefixes=None
            if self.prefixes is None
            else shared_prefixes([self.prefixes.of(int(request)) for request in index], self.prefixes.chunk_tokens),
        )


def shared_prefixes(chunks: Sequence[Sequence[int] | Ints], chunk_tokens: int) -> Prefixes | None:
    """Number the chunks anew from 0, and leave out what only one request has: it can never be found in a cache.

    Args:
        chunks: for each request the names of its leading chunks.
        chunk_tokens: their length.

    Returns:
        None when nothing is shared.
    """
    lengths = np.array([len(part) for part in chunks], dtype=np.int64)
    flat = np.concatenate([np.asarray(part, dtype=np.int64) for part in chunks]) if len(chunks) else NO_INTS
    if len(flat) == 0:
        return None
    _, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    shared = counts[inverse] > 1
    kept = [inverse[a:b][: _leading(shared[a:b])] for a, b in pairwise(starts)]
    offsets = np.concatenate(([0], np.cumsum([len(part) for part in kept]))).astype(np.int64)
    ids = np.concatenate(kept)
    if len(ids) == 0:
        return None
    _, dense = np.unique(ids, return_inverse=True)
    return Prefixes(chunk_tokens=chunk_tokens, offsets=offsets, ids=dense.astype(np.int64))


def as_ints(values: Any) -> Ints:
    """Whole numbers as an array of the one integer type the simulator uses."""
    return np.asarray(values, dtype=np.int64)


def _leading(flags: NDArray[np.bool_]) -> int:
    """How many are true from the first one on."""
    falls = np.flatnonzero(~flags)
    return int(falls[0]) if len(falls) else len(flags)


def _check_prefixes(prefixes: Prefixes, prompt_tokens: Ints, source: str) -> None:
    counts = np.diff(prefixes.offsets)
    if prefixes.chunk_tokens < 1 or len(counts) != len(prompt_tokens):
        raise ConfigError(f"{source}: the shared prefixes are of {len(counts)} requests, not {len(prompt_tokens)}")
    if np.any(counts * prefixes.chunk_tokens > prompt_tokens):
        raise ConfigError(f"{source}: a shared prefix is longer than its prompt")
