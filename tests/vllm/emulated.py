"""vLLM's own EngineCore in this process, with its scheduler, its executor and our connector, stepped by hand.

Emulated engines do not wait (dilation 0), so a test of logic takes what the host takes. Arguments are command lines,
read by vLLM's parser with our flags in it, as `vllm serve` reads them.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs.engine import tokens_input
from vllm.renderers import renderer_from_config
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.executor.abstract import Executor

from vllm_disagg.core.keys import create_key_file
from vllm_disagg.core.latency import LatencyModel, Regime
from vllm_disagg.core.profile import ModelShape, ParallelEntry, Profile, profile_document
from vllm_disagg.core.types import new_transfer_id
from vllm_disagg.emulation.executor import EmulatedExecutor
from vllm_disagg.emulation.worker import EmulatedWorker
from vllm_disagg.plugin import register
from vllm_disagg.testing.leaks import assert_no_leaks

WAIT_S = 20.0

_numbers = itertools.count()


@functools.cache
def _parser() -> FlexibleArgumentParser:
    register()
    return EngineArgs.add_cli_args(FlexibleArgumentParser())


_renderers: dict[str, Any] = {}


def _renderer(config: Any) -> Any:
    """Of a model's folder: vLLM takes a third of a second to copy its tokenizer, and all engines may share one."""
    if config.model_config.model not in _renderers:
        _renderers[config.model_config.model] = renderer_from_config(config)
    return _renderers[config.model_config.model]


@dataclass(slots=True)
class Answer:
    """All that an engine has said to one request."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    kv_transfer_params: dict[str, Any] | None = None
    logprobs: list[tuple[list[int], list[float], int]] = field(default_factory=list)
    """For each token: ids and log probabilities, the sampled token first, and its rank."""
    prompt_logprobs: list[Any] = field(default_factory=list)
    num_logprobs: int = 0
    """How many alternatives were asked for; a row of a batch is as wide as its widest request."""
    num_outputs: int = 0

    @property
    def words(self) -> tuple[Any, ...]:
        """What a client would see, for comparing."""
        return (self.tokens, self.finish_reason, self.stop_reason, self.logprobs)


class Engine:
    """One EngineCore.

    Args:
        flags: as on the command line of `vllm serve`.
        transport: of an engine with a role.
        asynchronous: schedules a step before it knows the tokens of the last one, as on GPUs. vLLM switches that off
            for its CPU platform, but neither its EngineCore nor an emulated device minds.

    Attributes:
        decisions: what every call of the scheduler has decided, since the start.
    """

    def __init__(self, flags: Sequence[str], *, transport: str = "loopback", asynchronous: bool = False) -> None:
        namespace = _parser().parse_args(list(flags))
        if namespace.kv_transfer_config is not None:
            namespace.kv_transfer_config.kv_connector_extra_config["transport"] = transport
        self.config = EngineArgs.from_cli_args(namespace).create_engine_config()
        self.config.scheduler_config.async_scheduling = asynchronous
        self.core = EngineCore(self.config, Executor.get_class(self.config), log_stats=False)
        self.inputs = InputProcessor(self.config, _renderer(self.config))
        self.answers: dict[str, Answer] = {}
        self.decisions: list[Decision] = []
        self._record()

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def workers(self) -> list[EmulatedWorker]:
        """The ranks of an emulated engine."""
        assert isinstance(self.core.model_executor, EmulatedExecutor)
        return self.core.model_executor._workers

    def add(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        kv_params: dict[str, Any] | None = None,
        name: str | None = None,
        priority: int = 0,
    ) -> str:
        """Send a request in, as the API server does. Returns its id."""
        sampling = sampling.clone()
        sampling.output_kind = RequestOutputKind.DELTA
        if kv_params is not None:
            sampling.extra_args = {**(sampling.extra_args or {}), "kv_transfer_params": kv_params}
        name = name or f"request-{next(_numbers)}"
        prompt = tokens_input(list(token_ids))
        request = self.inputs.process_inputs(name, prompt, sampling, ("generate",), arrival_time=0.0, priority=priority)
        self.answers[name] = Answer(num_logprobs=sampling.logprobs or 0)
        self.core.add_request(*self.core.preprocess_add_request(request))
        return name

    def step(self) -> None:
        """One turn of the engine's loop."""
        if not (self.scheduler.has_requests() or self.core.batch_queue):
            return
        outputs, executed = self.core.step_fn()
        self.core.post_step(executed)
        for group in (outputs or {}).values():
            for output in group.outputs:
                self._take(self.answers[output.request_id], output)

    def run_until(self, condition: Callable[[], bool], what: str = "condition", *, step_s: float = 0.0) -> None:
        """Step until the condition holds.

        Args:
            condition: looked at before each step.
            what: it stands for.
            step_s: a pause after each step, where streams must not end before the connector's threads get to work.
        """
        deadline_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline_s, f"{what} did not come within {WAIT_S} s"
            before = len(self.decisions)
            self.step()
            if before == len(self.decisions) or not self.decisions[-1].tokens:
                time.sleep(0.0002)  # nothing to compute: let the connector's threads run, as vLLM's loop does
            elif step_s:
                time.sleep(step_s)

    def run(self, request_ids: Sequence[str]) -> list[Answer]:
        """Step until these requests have ended."""
        self.run_until(lambda: all(self.answers[name].finish_reason for name in request_ids), "the end of the answers")
        return [self.answers[name] for name in request_ids]

    def answer(self, token_ids: Sequence[int], sampling: SamplingParams) -> Answer:
        """Run one request alone."""
        return self.run([self.add(token_ids, sampling)])[0]

    def status(self, name: str) -> str:
        request = self.scheduler.requests.get(name)
        return "gone" if request is None else request.status.name

    def blocks_of(self, name: str) -> list[int]:
        """A request's blocks, also those into which its KV comes before vLLM has given it any."""
        blocks = list(self.scheduler.kv_cache_manager.get_block_ids(name)[0])
        if not blocks and self.scheduler.connector is not None:
            fetch = self.scheduler.connector._decode._by_request[name]
            assert fetch.early and not fetch.first
            blocks = list(fetch.blocks[0])
        return blocks

    def settle(self) -> None:
        """Come to rest, and hold nothing."""
        connector = self.scheduler.connector
        self.run_until(
            lambda: (
                not self.scheduler.has_requests()
                and not self.core.batch_queue
                and (connector is None or connector.num_outstanding == 0)
            ),
            "rest",
        )
        if connector is not None:
            assert_no_leaks(self.scheduler)

    def stop(self) -> None:
        """End its threads. `EngineCore.shutdown` would collect garbage for a second."""
        self.core.structured_output_manager.clear_backend()
        self.core.model_executor.shutdown()
        self.scheduler.shutdown()

    def _record(self) -> None:
        schedule = self.scheduler.schedule

        @functools.wraps(schedule)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.decisions.append(Decision.of(output))
            return output

        self.scheduler.schedule = recorded

    def _take(self, answer: Answer, output: Any) -> None:
        answer.num_outputs += 1
        answer.tokens += output.new_token_ids
        if output.new_logprobs is not None:
            (ids, values, ranks, _), width = output.new_logprobs, answer.num_logprobs + 1
            answer.logprobs += [
                (np.asarray(row).tolist()[:width], np.asarray(value).tolist()[:width], int(rank))
                for row, value, rank in zip(ids, values, ranks, strict=True)
            ]
        if output.new_prompt_logprobs_tensors is not None:
            answer.prompt_logprobs.append(output.new_prompt_logprobs_tensors)
        if output.finish_reason is not None:
            answer.finish_reason, answer.stop_reason = str(output.finish_reason), output.stop_reason
            answer.kv_transfer_params = output.kv_transfer_params


@dataclass(frozen=True, slots=True)
class Decision:
    """One step as the scheduler decided it."""

    tokens: tuple[tuple[str, int], ...]
    """Request and how many tokens it computes, in the batch's order."""
    new: tuple[tuple[str, int], ...]
    """Requests of their first step, with the tokens that the prefix cache has saved them."""
    resumed: tuple[str, ...]
    preempted: tuple[str, ...]
    finished: tuple[str, ...]
    blocks: tuple[Any, ...]
    """Block ids given to each request in this step."""

    @classmethod
    def of(cls, output: Any) -> Decision:
        cached = output.scheduled_cached_reqs
        return cls(
            tokens=tuple(output.num_scheduled_tokens.items()),
            new=tuple((request.req_id, request.num_computed_tokens) for request in output.scheduled_new_reqs),
            resumed=tuple(sorted(cached.resumed_req_ids)),
            preempted=tuple(sorted(output.preempted_req_ids or ())),
            finished=tuple(sorted(output.finished_req_ids)),
            blocks=(
                *((request.req_id, _copied(request.block_ids)) for request in output.scheduled_new_reqs),
                *zip(cached.req_ids, map(_copied, cached.new_block_ids), strict=True),
            ),
        )


def _copied(blocks: Any) -> tuple[tuple[int, ...], ...]:
    """vLLM's model runner lets the scheduler's lists grow."""
    return tuple(tuple(group) for group in blocks or ())


def emulated(*flags: str, profile: str = "tiny", asynchronous: bool = False) -> Engine:
    """An undivided emulated engine, unless the flags have a role."""
    return Engine(["--emulate", profile, "--dilation", "0", *flags], asynchronous=asynchronous)


def tiny_llama_profile(folder: Path, *degrees: int) -> Path:
    """A profile of the tiny Llama that real engines run, with these tensor-parallel degrees."""
    regime = Regime(constant_s=0.001)
    entries = {
        tp: ParallelEntry(
            tp=tp, latency=LatencyModel(prefill=(regime,), decode=(regime,)), kv_capacity_tokens={1: 65536}
        )
        for tp in degrees
    }
    shape = ModelShape(
        name="tiny-llama",
        num_layers=3,
        num_heads=8,
        num_kv_heads=4,
        head_size=32,
        hidden_size=256,
        weight_bytes=5_000_000,
        kv_bytes_per_token=3072,
        max_model_len=4096,
    )
    profile = Profile(
        model=shape, device="none", device_memory_bytes=2**30, kind="guess", source="for tests", entries=entries
    )
    path = folder / "profile.json"
    path.write_text(json.dumps(profile_document(profile)), encoding="utf-8")
    return path


class Split:
    """A prefill and a decode engine, and the part of the proxy between them.

    Args:
        folder: for the deployment's key.
        port: of prefill's control channel.
        flags: of both engines.
        decode_flags: of the decode engine alone.
        prefill_flags: of the prefill engine alone.
        asynchronous: of both engines.
    """

    def __init__(
        self,
        folder: Path,
        port: int,
        flags: Sequence[str] = (),
        decode_flags: Sequence[str] = (),
        prefill_flags: Sequence[str] = (),
        *,
        asynchronous: bool = False,
    ) -> None:
        create_key_file(folder / "key")
        shared = [*flags, "--kv-key-file", str(folder / "key"), "--kv-control-port", str(port)]
        self.prefill = emulated(*shared, *prefill_flags, "--kv-role", "prefill", asynchronous=asynchronous)
        self.decode = emulated(*shared, *decode_flags, "--kv-role", "decode", asynchronous=asynchronous)

    def hand_over(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[str]:
        """Run prompts on prefill, all at once, and send each with its handoff to decode. Returns decode's ids."""
        ids = [new_transfer_id() for _ in prompts]
        names = [
            self.prefill.add(
                tokens,
                SamplingParams(max_tokens=1, temperature=0.0),
                kv_params={"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id},
            )
            for tokens, transfer_id in zip(prompts, ids, strict=True)
        ]
        names_on_decode = []
        for answer, tokens, wish, transfer_id in zip(self.prefill.run(names), prompts, sampling, ids, strict=True):
            assert answer.kv_transfer_params is not None, "prefill has given no handoff"
            params = {
                "do_remote_prefill": True,
                "transfer_id": transfer_id,
                "handoff": answer.kv_transfer_params["handoff"],
            }
            names_on_decode.append(self.decode.add(tokens, wish, kv_params=params))
        return names_on_decode

    def answers(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[Answer]:
        """Requests over both engines, all at once."""
        return self.decode.run(self.hand_over(prompts, sampling))

    def settle(self) -> None:
        self.decode.settle()
        self.prefill.settle()

    def stop(self) -> None:
        self.decode.stop()
        self.prefill.stop()


class Requests:
    """Prompts and wishes of all kinds, the same for each seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._prefixes = [self._words(length) for length in (16, 40, 64, 130)]

    def prompt(self) -> list[int]:
        rng = self._rng
        length = rng.choice([2, 3, 15, 16, 17, 31, 32, 33, 48, 49, 64, rng.randrange(2, 200)])
        return (rng.choice(self._prefixes) if rng.random() < 0.4 else []) + self._words(length)

    def sampling(self) -> SamplingParams:
        rng = self._rng
        wishes = rng.choice(
            [
                {},
                {"seed": rng.randrange(1000), "temperature": 0.9, "top_p": 0.9},
                {"seed": rng.randrange(1000), "temperature": 1.5, "top_k": 5, "min_p": 0.05},
                {"logprobs": 5},
                {"seed": 7, "temperature": 0.7, "logprobs": 0},
                {"allowed_token_ids": list(range(9000, 9008)), "stop_token_ids": [9000, 9001]},
                {"frequency_penalty": 1.0, "repetition_penalty": 1.2, "logprobs": 2},
                {"min_tokens": 2, "logit_bias": {9100: 7.5}},
            ]
        )
        return SamplingParams(
            **{
                "temperature": 0.0,
                "max_tokens": rng.choice([1, 2, 5, 9, 40]),
                "ignore_eos": rng.random() < 0.5,
                **wishes,
            }
            | ({"max_tokens": 6} if "min_tokens" in wishes else {})
        )

    def is_local(self) -> bool:
        """Whether the proxy would send this one to decode alone."""
        return self._rng.random() < 0.1

    def _words(self, length: int) -> list[int]:
        return [self._rng.randrange(4200, 28000) for _ in range(length)]
