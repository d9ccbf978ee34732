"""Traces of requests, and what an engine's scheduler decides on them.

    python -m tests.vllm.traces FILE NUMBER...

runs traces on vLLM's real engine with a tiny Llama on CPU, one engine for each, and writes what was decided as JSON.
A process of its own, since vLLM's CPU worker binds its process's threads to cores.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.vllm.emulated import Engine

MAX_MODEL_LEN = 640
BLOCKS = "num-gpu-blocks-override"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request, whose end nothing but its length decides.

    Args:
        prompt: token ids.
        num_tokens: length of its answer.
        step: before which step it comes in.
        gone_step: before which step its client leaves.
        priority: lower goes first, where the policy asks for it.
    """

    prompt: tuple[int, ...]
    num_tokens: int
    step: int = 0
    gone_step: int | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests and the engine that serves them. All requests of step 0 are queued before the first step.

    Args:
        flags: of the engine.
        preempts, hits, chunks: whether it must come to preemptions, prefix-cache hits, chunked prompts.
    """

    arrivals: tuple[Arrival, ...]
    flags: dict[str, str] = field(default_factory=dict)
    preempts: bool = False
    hits: bool = False
    chunks: bool = False

    def run(self, engine: Engine) -> dict[str, Any]:
        """Serve all requests. Returns the decisions and what they depend on, as plain JSON."""
        from vllm.sampling_params import SamplingParams

        for step in range(10_000):
            for index, arrival in enumerate(self.arrivals):
                if arrival.step == step:
                    wish = SamplingParams(temperature=0.0, max_tokens=arrival.num_tokens, ignore_eos=True)
                    engine.add(arrival.prompt, wish, name=str(index), priority=arrival.priority)
                if arrival.gone_step == step:
                    engine.core.abort_requests([str(index)])
            if not engine.scheduler.has_requests() and all(arrival.step <= step for arrival in self.arrivals):
                break
            engine.step()
        cache = engine.config.cache_config
        document = {
            "decisions": [dataclasses.asdict(decision) for decision in engine.decisions],
            "scheduler": repr(engine.config.scheduler_config),
            "cache": [cache.block_size, cache.num_gpu_blocks, cache.enable_prefix_caching],
            "lengths": [len(engine.answers[str(index)].tokens) for index in range(len(self.arrivals))],
        }
        return json.loads(json.dumps(document))


def traces() -> list[Trace]:
    """All of them. The first few are of every kind."""
    found = [
        _trace(0, 12, long=True, flags={BLOCKS: "24"}, preempts=True, chunks=True),
        _trace(1, 20, shared=0.8, flags={"block-size": "64", BLOCKS: "24"}, hits=True),
        _trace(
            2,
            14,
            long=True,
            steps=30,
            gone=0.3,
            shared=0.5,
            flags={BLOCKS: "26"},
            preempts=True,
            hits=True,
        ),
    ]
    for seed, (block_size, num_blocks) in enumerate([(32, 30), (32, 38), (64, 16), (64, 20), (128, 10), (128, 14)]):
        blocks = {"block-size": str(block_size), BLOCKS: str(num_blocks)}
        few = {"max-num-seqs": str(3 + 5 * seed), "max-num-batched-tokens": str(64 << seed % 4)}
        found += [
            _trace(10 + seed, 20, flags=blocks | few),
            _trace(20 + seed, 24, shared=0.7, flags=blocks | {"max-num-batched-tokens": "512"}, hits=True),
            _trace(30 + seed, 24, long=True, flags=blocks, preempts=True),
        ]
    found += [
        _trace(50, 20, shared=0.7, flags={"no-enable-prefix-caching": "", BLOCKS: "36"}),
        _trace(51, 20, long=True, flags={"scheduling-policy": "priority", BLOCKS: "28"}, preempts=True),
        _trace(52, 20, steps=20, flags={"long-prefill-token-threshold": "48", BLOCKS: "40"}),
        _trace(53, 30, steps=60, gone=0.4, shared=0.6, flags={BLOCKS: "30"}, hits=True),
        _trace(54, 24, long=True, steps=40, flags={BLOCKS: "24", "max-num-seqs": "8"}, preempts=True),
    ]  # fmt: skip
    return found


def _trace(
    seed: int,
    count: int,
    *,
    shared: float = 0.0,
    long: bool = False,
    steps: int = 0,
    gone: float = 0.0,
    flags: dict[str, str] | None = None,
    **expected: bool,
) -> Trace:
    """A random one.

    Args:
        seed: all of it follows from this.
        count: requests.
        shared: share of prompts that begin as others do.
        long: long answers, so that running requests outgrow the KV cache.
        steps: requests come within so many steps instead of all at once.
        gone: share of clients that leave.
        flags: of the engine.
        expected: see `Trace`.
    """
    rng = random.Random(seed)
    prefixes = [_words(rng, length) for length in (64, 128, 200)]
    arrivals = []
    for _ in range(count):
        prefix = rng.choice(prefixes) if rng.random() < shared else ()
        length = rng.choice([1, 31, 32, 33, 64, rng.randrange(2, 250)])
        step = rng.randrange(steps) if steps else 0
        arrivals.append(
            Arrival(
                prompt=prefix + _words(rng, length),
                num_tokens=rng.randrange(60, 150) if long else rng.choice([1, 2, 10, 30]),
                step=step,
                gone_step=step + rng.randrange(1, 30) if rng.random() < gone else None,
                priority=rng.randrange(3),
            )
        )
    return Trace(arrivals=tuple(arrivals), flags=flags or {}, **expected)


def _words(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(5, 250) for _ in range(length))


def flags_of(trace: Trace, *extra: str) -> list[str]:
    """A command line for its engine, real or emulated."""
    from vllm_disagg.demo.model import tiny_llama_path

    flags = {
        "model": str(tiny_llama_path()),
        "dtype": "float32",
        "block-size": "32",
        "max-model-len": str(MAX_MODEL_LEN),
        "max-num-seqs": "12",
        "max-num-batched-tokens": "128",
        "generation-config": "vllm",
    } | trace.flags
    return [*(word for name, value in flags.items() for word in (f"--{name}", value) if word), *extra]


def main(arguments: Sequence[str]) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else vLLM starts a process of its own for the worker
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    from tests.vllm.emulated import Engine

    all_traces, results = traces(), {}
    for number in map(int, arguments[1:]):
        trace = all_traces[number]
        engine = Engine(flags_of(trace, "--distributed-executor-backend", "uni", "--enforce-eager"))
        results[number] = trace.run(engine)
        engine.stop()
    Path(arguments[0]).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
