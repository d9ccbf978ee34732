"""vLLM's own scheduler with our mixins and our connector's two halves, in one process and without a model.

Steps are taken by hand: the test plays the model runner. Its "forward pass" writes a pattern that depends on the
prompt into the blocks of a prefill engine, so that a wrong block or a missing copy shows.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_disagg import scheduler as factories
from vllm_disagg.config import EngineSettings, Role, VerifyMode
from vllm_disagg.connector.facade import DisaggConnector
from vllm_disagg.connector.stats import TransferStats
from vllm_disagg.core.keys import create_key_file
from vllm_disagg.core.types import new_transfer_id
from vllm_disagg.demo.model import tiny_llama_path
from vllm_disagg.plugin import register
from vllm_disagg.scheduler.wakeup import LONGEST_SLEEP_S
from vllm_disagg.transport.loopback import LoopbackTransport

BLOCK_SIZE = 32
NUM_BLOCKS = 64
NUM_LAYERS, NUM_HEADS, HEAD_SIZE = 3, 4, 8
LAYER = "model.layers.{}.self_attn.attn"
WAIT_S = 10.0

Policy = Literal["fcfs", "priority"]

_numbers = itertools.count()


@functools.cache
def vllm_config(
    role: Role,
    key_file: Path,
    control_port: int,
    lease_s: float,
    pull_timeout_s: float,
    tp: int = 1,
    pp: int = 1,
    verify: VerifyMode = "off",
    policy: Policy = "fcfs",
) -> VllmConfig:
    register()
    settings = EngineSettings(
        role=role,
        transport="loopback",
        control_port=control_port,
        lease_s=lease_s,
        pull_timeout_s=pull_timeout_s,
        verify=verify,
        key_file=str(key_file),
    )
    transfer = KVTransferConfig(
        kv_connector="DisaggConnector",
        kv_role="kv_producer" if role == "prefill" else "kv_consumer",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=settings.to_extra_config(),
    )
    args = EngineArgs(
        model=str(tiny_llama_path()),
        dtype="float32",
        block_size=BLOCK_SIZE,
        max_model_len=1024,
        max_num_seqs=16,
        enforce_eager=True,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        scheduling_policy=policy,
        kv_transfer_config=transfer,
        scheduler_cls=f"vllm_disagg.scheduler.{role}_scheduler",
    )
    config = args.create_engine_config()
    config.cache_config.num_gpu_blocks = NUM_BLOCKS
    return config


def _kv_cache_config(layers: range, heads: range) -> KVCacheConfig:
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=len(heads), head_size=HEAD_SIZE, dtype=torch.float32)
    names = [LAYER.format(layer) for layer in layers]
    return KVCacheConfig(num_blocks=NUM_BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(names, spec)])


def build_scheduler(role: Role, config: VllmConfig) -> Any:
    """The role's scheduler, as EngineCore builds it."""
    build = factories.prefill_scheduler if role == "prefill" else factories.decode_scheduler
    return build(
        vllm_config=config,
        kv_cache_config=_kv_cache_config(range(NUM_LAYERS), range(NUM_HEADS)),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        log_stats=True,
    )


def pattern(token_ids: list[int], layer: int, block: int, head: int) -> float:
    """What a forward pass leaves of one block of a prompt: different for every prefix, layer and head."""
    return float(hash((tuple(token_ids[: (block + 1) * BLOCK_SIZE]), layer, block, head)) % 1_000_003)


@dataclass
class Rank:
    """One worker without a model: its part of the KV cache and its half of the connector."""

    worker: DisaggConnector
    layers: range
    heads: range
    caches: dict[int, torch.Tensor]

    @classmethod
    def start(cls, config: VllmConfig, *, rank: int, tp: int, pp: int) -> Rank:
        stage, tp_rank = divmod(rank, tp)
        edges = [NUM_LAYERS * index // pp for index in range(pp + 1)]
        layers = range(edges[stage], edges[stage + 1])
        shares = min(tp, NUM_HEADS)
        each = NUM_HEADS // shares
        first = tp_rank * shares // tp * each
        mine = copy.copy(config)
        mine.parallel_config = copy.copy(config.parallel_config)
        mine.parallel_config.rank = rank
        worker = DisaggConnector(mine, KVConnectorRole.WORKER, _kv_cache_config(layers, range(first, first + each)))
        caches = {layer: torch.zeros(NUM_BLOCKS, each, BLOCK_SIZE, 2 * HEAD_SIZE) for layer in layers}
        worker.register_kv_caches({LAYER.format(layer): cache for layer, cache in caches.items()})
        return cls(worker, layers, range(first, first + each), caches)

    @property
    def transport(self) -> LoopbackTransport:
        assert self.worker._worker is not None
        thread = self.worker._worker._thread
        assert thread is not None
        assert isinstance(thread._transport, LoopbackTransport)
        return thread._transport

    def write(self, token_ids: list[int], block: int, block_id: int) -> None:
        for layer, cache in self.caches.items():
            for index, head in enumerate(self.heads):
                cache[block_id, index] = pattern(token_ids, layer, block, head)

    def is_right(self, token_ids: list[int], block: int, block_id: int) -> bool:
        return all(
            bool((cache[block_id, index] == pattern(token_ids, layer, block, head)).all())
            for layer, cache in self.caches.items()
            for index, head in enumerate(self.heads)
        )


@dataclass
class Engine:
    """One engine without a model, of any parallelism."""

    role: Role
    config: VllmConfig
    scheduler: Any
    ranks: list[Rank]
    finished: dict[str, Any] = field(default_factory=dict)
    stats: TransferStats = field(default_factory=TransferStats)

    @classmethod
    def start(
        cls,
        role: Role,
        key_file: Path,
        *,
        control_port: int,
        lease_s: float = 30.0,
        pull_timeout_s: float = 10.0,
        tp: int = 1,
        pp: int = 1,
        verify: VerifyMode = "off",
        policy: Policy = "fcfs",
    ) -> Engine:
        config = vllm_config(role, key_file, control_port, lease_s, pull_timeout_s, tp, pp, verify, policy)
        config.kv_transfer_config.engine_id = f"{role}-{next(_numbers)}"
        scheduler = build_scheduler(role, config)
        ranks = [Rank.start(config, rank=rank, tp=tp, pp=pp) for rank in range(tp * pp)]
        scheduler.connector.set_xfer_handshake_metadata_pp_aware(
            {divmod(number, tp): rank.worker.get_handshake_metadata() for number, rank in enumerate(ranks)}
        )
        return cls(role, config, scheduler, ranks)

    def take_stats(self) -> dict[str, Any]:
        """What the engine has reported since the last call."""
        self.step()  # whatever was not reported yet goes with this one
        data = self.stats.data
        self.stats.reset()
        return data

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def transport(self) -> LoopbackTransport:
        """Of the first rank."""
        return self.ranks[0].transport

    def add(
        self,
        token_ids: list[int],
        params: Any,
        *,
        max_tokens: int = 1,
        name: str | None = None,
        within_step: Callable[[], None] | None = None,
    ) -> str:
        """A request as EngineCore adds it. Returns its id.

        Args:
            within_step: the request arrives while a step runs, and this happens before the step's end.
        """
        request = self.request(token_ids, params, max_tokens=max_tokens, name=name)
        if within_step is not None:
            self.scheduler.connector.on_arrival(request)
            within_step()
        self.scheduler.add_request(request)
        return request.request_id

    def request(self, token_ids: list[int], params: Any, *, max_tokens: int = 1, name: str | None = None) -> Request:
        """A request as EngineCore's input thread prepares it."""
        extra = {"kv_transfer_params": params} if params is not None else {}
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
        init_none_hash(sha256_cbor)
        return Request(
            request_id=name or f"{self.role}-request-{next(_numbers)}",
            prompt_token_ids=list(token_ids),
            sampling_params=sampling,
            pooling_params=None,
            block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256_cbor),
        )

    def step(self) -> Any:
        """One engine step: schedule, "compute", update. Returns what was scheduled."""
        output = self.scheduler.schedule()
        for rank in self.ranks:
            rank.worker.bind_connector_metadata(output.kv_connector_metadata)
        self._forward(output)
        for rank in self.ranks:
            rank.worker.clear_connector_metadata()
        ids = list(output.num_scheduled_tokens)
        sampled = [self._sample(request_id) for request_id in ids]
        result = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
            kv_connector_output=KVConnectorOutput(),
        )
        for outputs in self.scheduler.update_from_output(output, result).values():
            if outputs.scheduler_stats is not None and outputs.scheduler_stats.kv_connector_stats:
                self.stats.aggregate(TransferStats(data=outputs.scheduler_stats.kv_connector_stats))
            for item in outputs.outputs:
                if item.finish_reason is not None:
                    self.finished[item.request_id] = item
        return output

    def run_until(self, condition: Any, what: str = "condition") -> None:
        """Step, as the engine loop does while it has work or is woken, until the condition holds."""
        now_s = time.monotonic()
        deadline_s, asleep_s = now_s + WAIT_S, now_s
        while not condition():
            now_s = time.monotonic()
            assert now_s < deadline_s, f"{self.role}: {what} did not come within {WAIT_S} s"
            sleeps = self.scheduler.only_awaits_kv and now_s < asleep_s + LONGEST_SLEEP_S
            if self.scheduler.has_requests() and not sleeps:
                self.step()
                asleep_s = time.monotonic()
            time.sleep(0.001)  # as vLLM's engine loop does between empty steps

    def run_until_finished(self, request_id: str) -> Any:
        self.run_until(lambda: request_id in self.finished, f"the end of {request_id}")
        return self.finished[request_id]

    def status(self, request_id: str) -> str:
        request = self.scheduler.requests.get(request_id)
        return "gone" if request is None else request.status.name

    def parked(self, request_id: str) -> bool:
        return self.status(request_id) == "WAITING_FOR_REMOTE_KVS"

    def abort(self, request_id: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def blocks_of(self, request_id: str) -> list[int]:
        return list(self.scheduler.kv_cache_manager.get_block_ids(request_id)[0])

    def prompt_blocks_are_right(self, request_id: str) -> bool:
        """Whether each prompt block of a request, but the last token's, holds its own prompt's pattern."""
        request = self.scheduler.requests[request_id]
        tokens, ids = list(request.prompt_token_ids), self.blocks_of(request_id)
        return all(
            rank.is_right(tokens, block, ids[block])
            for rank in self.ranks
            for block in range(-(-len(tokens) // BLOCK_SIZE))
        )

    def stop(self) -> None:
        self.scheduler.shutdown()
        for rank in self.ranks:
            rank.worker.shutdown()

    def _forward(self, output: Any) -> None:
        """Write the pattern of every prompt block that this step computes."""
        for request_id, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[request_id]
            tokens, ids = list(request.prompt_token_ids), self.blocks_of(request_id)
            after = min(request.num_computed_tokens, len(tokens))  # `schedule` has advanced it by `count` already
            before = max(0, request.num_computed_tokens - count)
            for block in range(before // BLOCK_SIZE, -(-after // BLOCK_SIZE)):
                for rank in self.ranks:
                    rank.write(tokens, block, ids[block])

    def _sample(self, request_id: str) -> list[int]:
        request = self.scheduler.requests[request_id]
        return [7] if request.num_computed_tokens >= request.num_prompt_tokens else []


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed * 1000 + length)
    return [rng.randrange(5, 250) for _ in range(length)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Pair:
    """A prefill and a decode engine, each of its own tensor-parallel and pipeline degree."""

    def __init__(
        self,
        folder: Path,
        *,
        prefill: tuple[int, int] = (1, 1),
        decode: tuple[int, int] = (1, 1),
        verify: VerifyMode = "off",
        policy: Policy = "fcfs",
        **settings: float,
    ) -> None:
        key_file = folder / "key"
        create_key_file(key_file)
        port = free_port()
        self.prefill = Engine.start(
            "prefill", key_file, control_port=port, tp=prefill[0], pp=prefill[1], verify=verify, **settings
        )
        self.decode = Engine.start(
            "decode", key_file, control_port=port, tp=decode[0], pp=decode[1], policy=policy, **settings
        )

    def prefilled(self, token_ids: list[int]) -> dict[str, Any]:
        """Run a prompt on prefill. Returns the parameters for decode, as the proxy builds them."""
        transfer_id = new_transfer_id()
        request_id = self.prefill.add(
            token_ids, {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}
        )
        done = self.prefill.run_until_finished(request_id)
        return {"do_remote_prefill": True, "transfer_id": transfer_id, "handoff": done.kv_transfer_params["handoff"]}

    def overwrite_prefills_cache(self) -> None:
        """Run enough other prompts that every block which nobody holds is written anew."""
        for seed in range(30, 50):
            self.prefill.run_until_finished(self.prefill.add(prompt(300, seed=seed), None))

    def decode_rightly(self, token_ids: list[int], params: dict[str, Any]) -> None:
        """Run a prompt on decode, and check its blocks when it is admitted."""
        request_id = self.decode.add(token_ids, params, max_tokens=4)
        self.decode.run_until(lambda: self.decode.status(request_id) == "RUNNING", "admission")
        assert self.decode.prompt_blocks_are_right(request_id)
        self.decode.run_until_finished(request_id)

    def settle(self) -> None:
        """Let both engines come to rest."""
        for engine in (self.decode, self.prefill):
            engine.run_until(
                lambda engine=engine: (
                    not engine.scheduler.has_requests() and engine.scheduler.connector.num_outstanding == 0
                ),
                "rest",
            )

    def failures(self) -> dict[str, int]:
        """Failures by cause since the last look at decode's statistics."""
        name = "vllm_disagg_kv_failures_total"
        data = self.decode.take_stats()
        return {key[len(name) + 1 : -1]: value for key, value in data.items() if key.startswith(name)}

    def received(self) -> int:
        """Tokens received since the last look at decode's statistics."""
        return int(self.decode.take_stats().get("vllm_disagg_kv_tokens_received_total", 0))

    def close(self) -> None:
        self.prefill.stop()
        self.decode.stop()
