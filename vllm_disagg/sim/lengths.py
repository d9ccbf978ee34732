"""How long prompts and outputs are: fixed, drawn from data, fitted to data, or around published means.

Everything here draws prompt and output of a request together, since they are correlated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from vllm_disagg.errors import ConfigError
from vllm_disagg.sim.arrivals import Arrivals, fit_arrivals
from vllm_disagg.sim.workload import Floats, Ints, Prefixes, Workload, as_ints


class Lengths(Protocol):
    """A joint distribution of prompt and output lengths."""

    @property
    def source(self) -> str:
        """What it is, for reports."""
        ...

    def sample(self, num_requests: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """Draw prompt and output lengths, each at least 1."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedLengths:
    """Every request is the same."""

    prompt_tokens: int
    output_tokens: int

    @property
    def source(self) -> str:
        return f"fixed lengths {self.prompt_tokens}/{self.output_tokens}"

    def sample(self, num_requests: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
        return as_ints(np.full(num_requests, self.prompt_tokens)), as_ints(np.full(num_requests, self.output_tokens))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EmpiricalLengths:
    """Observed pairs, drawn with replacement (DistServe's section 4.1 resamples its traces)."""

    prompt_tokens: Ints
    output_tokens: Ints
    source: str

    def sample(self, num_requests: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
        index = rng.integers(0, len(self.prompt_tokens), num_requests)
        return self.prompt_tokens[index], self.output_tokens[index]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FittedLengths:
    """Both marginals by their quantiles, joined by a Gaussian copula: the shape of the data without its records.

    Args:
        prompt_quantiles, output_quantiles: evenly spaced quantiles from the least to the greatest.
        correlation: of the underlying normal distribution.
        source: what it was fitted to.
        max_total: largest sum of a pair; None without a limit.
        cut: cut the prompts of larger pairs, as DistServe does with LongBench's, instead of drawing them again.
    """

    prompt_quantiles: Floats
    output_quantiles: Floats
    correlation: float
    source: str
    max_total: int | None = None
    cut: bool = False

    def sample(self, num_requests: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
        prompt, output = self._draw(num_requests, rng)
        if self.max_total is None:
            return prompt, output
        if self.cut:
            return as_ints(np.maximum(np.minimum(prompt, self.max_total - output), 1)), output
        for _ in range(1000):
            over = np.flatnonzero(prompt + output > self.max_total)
            if len(over) == 0:
                return prompt, output
            prompt[over], output[over] = self._draw(len(over), rng)
        raise ConfigError(f"{self.source}: hardly any lengths stay below {self.max_total} tokens together")

    def _draw(self, num_requests: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
        first, second = _correlated(num_requests, self.correlation, rng)
        return _at_quantile(self.prompt_quantiles, first), _at_quantile(self.output_quantiles, second)


def fit_lengths(prompt_tokens: Ints, output_tokens: Ints, *, source: str, num_quantiles: int = 201) -> FittedLengths:
    """Fit a joint distribution to observed lengths.

    Raises:
        ConfigError: there are fewer than 2 requests.
    """
    if len(prompt_tokens) < 2:
        raise ConfigError(f"{source}: lengths can be fitted from 2 requests on, there is {len(prompt_tokens)}")
    grid = np.linspace(0.0, 1.0, num_quantiles)
    return FittedLengths(
        prompt_quantiles=np.quantile(prompt_tokens, grid).astype(np.float64),
        output_quantiles=np.quantile(output_tokens, grid).astype(np.float64),
        correlation=2.0 * math.sin(math.pi / 6.0 * _rank_correlation(prompt_tokens, output_tokens)),
        source=f"fitted to {source}",
    )


def _surrogate(name: str, prompt: list[int], output: list[int], correlation: float, *, cut: bool) -> FittedLengths:
    return FittedLengths(
        prompt_quantiles=np.array(prompt, dtype=np.float64),
        output_quantiles=np.array(output, dtype=np.float64),
        correlation=correlation,
        source=f"surrogate of {name}",
        max_total=2047,
        cut=cut,
    )


SURROGATES: Final[dict[str, FittedLengths]] = {
    "sharegpt-like": _surrogate(
        "ShareGPT",
        [1, 30, 118, 214, 298, 367, 438, 508, 576, 651, 728, 802, 881, 966, 1071, 1184, 1308, 1442, 1601, 1790, 2000],
        [1, 4, 8, 11, 14, 18, 25, 32, 44, 66, 101, 147, 201, 253, 303, 351, 407, 470, 558, 694, 1855],
        -0.1,
        cut=False,
    ),
    "humaneval-like": _surrogate(
        "HumanEval",
        [43, 65, 82, 88, 99, 109, 120, 131, 137, 145, 150, 162, 169, 176, 186, 215, 231, 253, 293, 347, 497],
        [8, 16, 22, 29, 36, 42, 50, 57, 67, 74, 79, 86, 97, 102, 115, 130, 142, 162, 198, 233, 445],
        0.46,
        cut=False,
    ),
    "longbench-like": _surrogate(
        "LongBench",
        [90, 900, 1250, 1560, 1740, 1850, 1890, 1900, 1910, 1920, 1925, 1930, 1935, 1940, 1950, 1960, 1970, 1980, 1990,
         2005, 2030],
        [4, 5, 6, 7, 8, 10, 12, 15, 20, 27, 36, 49, 66, 87, 111, 138, 170, 208, 256, 320, 500],
        0.0,
        cut=True,
    ),
}  # fmt: skip
"""Stand in for the data sets of DistServe's evaluation (section 6.1) where these are not at hand, with the means that
its Figure 7 gives: prompt/output 755.5/200.3, 171.3/98.2 and 1738.3/90.7 tokens. Each table is the quantiles in steps
of 5 %. The shape of the first is that of a part of ShareGPT, prepared as DistServe does, with 4 characters counted as a
token; of the second, that of HumanEval's characters; the third's is assumed: most prompts are cut at OPT's context
length."""


def make_workload(
    lengths: Lengths,
    *,
    num_requests: int,
    rate: float = 1.0,
    seed: int = 0,
    arrivals: Arrivals | None = None,
    shared_prefix_tokens: int = 0,
    num_prefixes: int = 1,
) -> Workload:
    """Draw requests. One seed, one workload; lengths and arrivals have streams of their own, so that changing one
    leaves the other.

    Args:
        lengths: the joint distribution of lengths.
        num_requests: how many.
        rate: mean requests per second.
        seed: of all that is drawn.
        arrivals: when they come; None for a Poisson process.
        shared_prefix_tokens: tokens put in front of every prompt, such as a system prompt.
        num_prefixes: how many different ones there are, equally likely.

    Raises:
        ConfigError: a value is out of range.
    """
    if num_requests < 1 or shared_prefix_tokens < 0 or num_prefixes < 1:
        raise ConfigError("a workload needs at least 1 request, 1 prefix, and a prefix length from 0 on")
    if not (math.isfinite(rate) and rate > 0):
        raise ConfigError(f"the rate must be a positive number, not {rate!r}")
    of_lengths, of_arrivals, of_prefixes = (np.random.default_rng([seed, stream]) for stream in range(3))
    prompt, output = lengths.sample(num_requests, of_lengths)
    prefixes = None
    if shared_prefix_tokens:
        prompt = prompt + shared_prefix_tokens
        prefixes = Prefixes(
            chunk_tokens=shared_prefix_tokens,
            offsets=as_ints(np.arange(num_requests + 1)),
            ids=as_ints(of_prefixes.integers(0, num_prefixes, num_requests)),
        )
    return Workload(
        arrival_s=(arrivals or Arrivals()).times(num_requests, rate, of_arrivals),
        prompt_tokens=as_ints(prompt),
        output_tokens=as_ints(output),
        rate=rate,
        source=lengths.source,
        prefixes=prefixes,
    )


def fit_workload(trace: Workload) -> tuple[FittedLengths, Arrivals]:
    """Distributions to draw from that have a trace's lengths and the variability of its arrivals."""
    lengths = fit_lengths(trace.prompt_tokens, trace.output_tokens, source=trace.source)
    return lengths, fit_arrivals(trace.arrival_s)


def lengths_of(trace: Workload) -> EmpiricalLengths:
    """A trace's own pairs, to be drawn with replacement. What its prompts share is lost."""
    return EmpiricalLengths(
        prompt_tokens=trace.prompt_tokens, output_tokens=trace.output_tokens, source=f"resampled from {trace.source}"
    )


def _correlated_normals(num: int, correlation: float, rng: np.random.Generator) -> tuple[Floats, Floats]:
    first, second = rng.standard_normal(num), rng.standard_normal(num)
    return first, correlation * first + math.sqrt(1.0 - correlation**2) * second


def _correlated(num: int, correlation: float, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Uniform in 0..1, joined by a Gaussian copula."""
    first, second = _correlated_normals(num, correlation, rng)
    return _normal_cdf(first), _normal_cdf(second)


def _normal_cdf(values: Floats) -> Floats:
    return np.array([0.5 * (1.0 + math.erf(value / math.sqrt(2.0))) for value in values])


def _at_quantile(quantiles: Floats, uniform: Floats) -> Ints:
    values = np.interp(uniform, np.linspace(0.0, 1.0, len(quantiles)), quantiles)
    return as_ints(_whole(values, 1))


def _whole(values: Floats, least: int) -> Ints:
    return as_ints(np.maximum(np.rint(np.minimum(values, 2**40)), least))


def _rank_correlation(first: Ints, second: Ints) -> float:
    """Spearman's; 0 where one of them never varies."""
    ranks = np.array([_ranks(values) for values in (first, second)])
    if np.any(ranks.std(axis=1) == 0):
        return 0.0
    return float(np.corrcoef(ranks)[0, 1])


def _ranks(values: Ints) -> Floats:
    """Equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: Floats = ends - (counts - 1) / 2.0
    return means[inverse]
