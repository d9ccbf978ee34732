"""vLLM's own scheduler with our mixins and our connector's two halves, in one process and without a model.

Steps are taken by hand: the test plays the model runner. Its "forward pass" writes a pattern that depends on the
prompt into the blocks of a prefill engine, so that a wrong block or a missing copy shows.
"""

from __future__ import annotations

import functools
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
from vllm_disagg.config import EngineSettings, Role
from vllm_disagg.connector.facade import DisaggConnector
from vllm_disagg.connector.stats import TransferStats
from vllm_disagg.demo.model import tiny_llama_path
from vllm_disagg.plugin import register
from vllm_disagg.transport.loopback import LoopbackTransport

BLOCK_SIZE = 32
NUM_BLOCKS = 64
LAYERS = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn")
SHAPE = (NUM_BLOCKS, 4, BLOCK_SIZE, 16)
WAIT_S = 10.0

_numbers = itertools.count()


@functools.cache
def vllm_config(role: Role, key_file: Path, control_port: int, lease_s: float, pull_timeout_s: float) -> VllmConfig:
    register()
    settings = EngineSettings(
        role=role,
        transport="loopback",
        control_port=control_port,
        lease_s=lease_s,
        pull_timeout_s=pull_timeout_s,
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
        kv_transfer_config=transfer,
        scheduler_cls=f"vllm_disagg.scheduler.{role}_scheduler",
    )
    config = args.create_engine_config()
    config.cache_config.num_gpu_blocks = NUM_BLOCKS
    return config


def _kv_cache_config() -> KVCacheConfig:
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=4, head_size=8, dtype=torch.float32)
    return KVCacheConfig(
        num_blocks=NUM_BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(list(LAYERS), spec)]
    )


def build_scheduler(role: Role, config: VllmConfig) -> Any:
    """The role's scheduler, as EngineCore builds it."""
    build = factories.prefill_scheduler if role == "prefill" else factories.decode_scheduler
    return build(
        vllm_config=config,
        kv_cache_config=_kv_cache_config(),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        log_stats=True,
    )


def pattern(token_ids: list[int], layer: int, block: int) -> float:
    """What a forward pass leaves in one block of a prompt: different for every prefix and layer."""
    return float(hash((tuple(token_ids[: (block + 1) * BLOCK_SIZE]), layer, block)) % 1_000_003)


@dataclass
class Engine:
    """One engine without a model. `caches` is its KV cache, one tensor per layer."""

    role: Role
    config: VllmConfig
    caches: dict[str, torch.Tensor]
    scheduler: Any
    worker: DisaggConnector
    finished: dict[str, Any] = field(default_factory=dict)
    stats: TransferStats = field(default_factory=TransferStats)

    @classmethod
    def start(
        cls, role: Role, key_file: Path, *, control_port: int, lease_s: float = 30.0, pull_timeout_s: float = 10.0
    ) -> Engine:
        config = vllm_config(role, key_file, control_port, lease_s, pull_timeout_s)
        config.kv_transfer_config.engine_id = f"{role}-{next(_numbers)}"
        caches = {name: torch.zeros(SHAPE) for name in LAYERS}
        scheduler = build_scheduler(role, config)
        worker = DisaggConnector(config, KVConnectorRole.WORKER, _kv_cache_config())
        worker.register_kv_caches(caches)
        scheduler.connector.set_xfer_handshake_metadata_pp_aware({(0, 0): worker.get_handshake_metadata()})
        return cls(role, config, caches, scheduler, worker)

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
        assert self.worker._worker is not None
        thread = self.worker._worker._thread
        assert thread is not None
        assert isinstance(thread._transport, LoopbackTransport)
        return thread._transport

    def add(self, token_ids: list[int], params: Any, *, max_tokens: int = 1, name: str | None = None) -> str:
        """A request as EngineCore adds it. Returns its id."""
        extra = {"kv_transfer_params": params} if params is not None else {}
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
        init_none_hash(sha256_cbor)
        request = Request(
            request_id=name or f"{self.role}-request-{next(_numbers)}",
            prompt_token_ids=list(token_ids),
            sampling_params=sampling,
            pooling_params=None,
            block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256_cbor),
        )
        self.scheduler.add_request(request)
        return request.request_id

    def step(self) -> Any:
        """One engine step: schedule, "compute", update. Returns what was scheduled."""
        output = self.scheduler.schedule()
        self.worker.bind_connector_metadata(output.kv_connector_metadata)
        self._forward(output)
        self.worker.clear_connector_metadata()
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
        deadline_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline_s, f"{self.role}: {what} did not come within {WAIT_S} s"
            if self.scheduler.has_requests():
                self.step()
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
            bool((self.caches[name][ids[block]] == pattern(tokens, layer, block)).all())
            for layer, name in enumerate(LAYERS)
            for block in range(-(-len(tokens) // BLOCK_SIZE))
        )

    def stop(self) -> None:
        self.scheduler.shutdown()
        self.worker.shutdown()

    def _forward(self, output: Any) -> None:
        """Write the pattern of every prompt block that this step computes."""
        for request_id, count in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[request_id]
            tokens, ids = list(request.prompt_token_ids), self.blocks_of(request_id)
            after = min(request.num_computed_tokens, len(tokens))  # `schedule` has advanced it by `count` already
            before = max(0, request.num_computed_tokens - count)
            for block in range(before // BLOCK_SIZE, -(-after // BLOCK_SIZE)):
                for layer, name in enumerate(LAYERS):
                    self.caches[name][ids[block]] = pattern(tokens, layer, block)

    def _sample(self, request_id: str) -> list[int]:
        request = self.scheduler.requests[request_id]
        return [7] if request.num_computed_tokens >= request.num_prompt_tokens else []
