"""Small parts that touch torch and vLLM: cutting tensors into blocks, statistics, the frontend, the wake-up."""

from __future__ import annotations

import json
import queue
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from vllm_disagg.config import KEY_ENV, EngineSettings
from vllm_disagg.connector import stats, worker_side
from vllm_disagg.connector.worker_side import segments_of
from vllm_disagg.core.introduction import INTRODUCE_PATH, check_introduction
from vllm_disagg.core.keys import load_key
from vllm_disagg.core.types import EngineId, new_transfer_id
from vllm_disagg.frontend import RELEASE_PATH, STATUS_PATH, DisaggFrontend
from vllm_disagg.scheduler import wakeup
from vllm_disagg.scheduler.safety import SafetyMixin
from vllm_disagg.transport.layout import RankLayout

pytestmark = pytest.mark.vllm


def test_a_cpu_cache_holds_each_head_of_a_block_in_one_piece() -> None:
    cache = torch.zeros(10, 3, 32, 128)

    (segment,) = segments_of("l", cache, 10, range(6, 9))

    assert (segment.address, segment.num_bytes) == (cache.data_ptr(), cache.nbytes)
    assert (segment.first_head, segment.num_heads) == (6, 3)
    assert (segment.block_stride, segment.head_stride) == (3 * 32 * 128 * 4, 32 * 128 * 4)
    assert (segment.num_rows, segment.row_bytes) == (1, 32 * 128 * 4)


def test_heads_inside_tokens_are_rows_of_a_token_each() -> None:
    cache = torch.zeros(10, 16, 4, 8, dtype=torch.float16).transpose(1, 2)

    (segment,) = segments_of("l", cache, 10, range(4))

    assert (segment.head_stride, segment.num_rows, segment.row_stride, segment.row_bytes) == (16, 16, 64, 16)


def test_heads_outside_blocks_have_a_stride_like_any_other() -> None:
    cache = torch.zeros(4, 10, 16, 8).transpose(0, 1)

    (segment,) = segments_of("l", cache, 10, range(4))

    assert (segment.block_stride, segment.head_stride, segment.row_bytes) == (512, 5120, 512)
    assert segment.num_bytes == cache.nbytes


def test_smaller_blocks_of_a_kernel_make_one_of_the_cache() -> None:
    cache = torch.zeros(30, 2, 16, 8)

    (segment,) = segments_of("l", cache, 10, range(2))

    assert (segment.num_blocks, segment.block_stride, segment.head_stride) == (10, 3 * 1024, 512)
    assert (segment.num_rows, segment.row_stride, segment.row_bytes) == (3, 1024, 512)


def test_layers_that_lie_among_each_other_are_registered_once() -> None:
    storage = torch.zeros(10, 2, 4, 16, 8)
    layers = {f"l{index}": storage[:, index] for index in range(2)}
    layout = RankLayout(groups=(tuple(segments_of(name, cache, 10, range(4))[0] for name, cache in layers.items()),))

    (region,) = worker_side._regions(layout)

    assert (region.address, region.num_bytes) == (storage.data_ptr(), storage.nbytes)


def test_heads_that_are_packed_otherwise_cannot_be_told_apart() -> None:
    (segment,) = segments_of("l", torch.zeros(10, 6, 16, 8), 10, range(3))

    assert (segment.head_stride, segment.num_rows, segment.row_bytes) == (0, 1, 6 * 16 * 8 * 4)


def test_keys_and_values_that_lie_apart_are_two_arrays() -> None:
    cache = torch.zeros(2, 10, 16, 4, 8, dtype=torch.float16)

    first, second = segments_of("l", cache, 10, range(4))

    assert second.address - first.address == 10 * 16 * 4 * 8 * 2
    assert first.cell_bytes == first.block_stride == 16 * 4 * 8 * 2
    assert (first.name, second.name) == ("l#0", "l#1")


def test_a_permuted_view_is_cut_by_its_strides() -> None:
    stored = torch.zeros(10, 2, 4, 16, 8)

    (segment,) = segments_of("l", stored.permute(1, 0, 3, 2, 4), 10, range(4))

    assert segment.cell_bytes == 2 * 4 * 16 * 8 * 4


def test_blocks_inside_a_larger_page_keep_their_stride() -> None:
    page = torch.zeros(10, 1000)

    (segment,) = segments_of("l", page[:, 100:356].view(10, 4, 64), 10, range(1))

    assert (segment.block_stride, segment.row_bytes) == (4000, 1024)


@pytest.mark.parametrize("cache", [torch.zeros(9, 4), torch.zeros(10, 4, 8, 2)[:, :3, :7, 0]])
def test_a_cache_without_blocks_or_in_too_many_pieces_is_refused(cache: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="of l"):
        segments_of("l", cache, 10, range(1))


def make_metrics() -> tuple[stats.TransferPromMetrics, CollectorRegistry]:
    registry = CollectorRegistry()

    def into(kind: type) -> Any:
        return lambda **values: kind(registry=registry, **values)

    config = SimpleNamespace(kv_transfer_config=None)
    types = {Gauge: into(Gauge), Counter: into(Counter), Histogram: into(Histogram)}
    return stats.TransferPromMetrics(config, types, ["engine"], {0: ["0"]}), registry


def test_observations_reach_prometheus_with_their_labels() -> None:
    metrics, registry = make_metrics()
    told = stats.TransferStats()
    told.observe("vllm_disagg_kv_transfer_seconds", 0.02)
    told.count("vllm_disagg_kv_tokens_received_total", 70)
    told.count("vllm_disagg_kv_failures_total", label="pull_timeout")
    told.gauge("vllm_disagg_kv_held_blocks", 4)

    metrics.observe(json.loads(json.dumps(told.to_dict())))
    metrics.observe(told.to_dict())

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"engine": "0", **labels})

    assert value("vllm_disagg_kv_transfer_seconds_count") == 2
    assert value("vllm_disagg_kv_tokens_received_total") == 140
    assert value("vllm_disagg_kv_failures_total", cause="pull_timeout") == 2
    assert value("vllm_disagg_kv_held_blocks") == 4


def test_intervals_add_up() -> None:
    first, second = stats.TransferStats(), stats.TransferStats()
    for told, held in ((first, 4), (second, 1)):
        told.observe("vllm_disagg_kv_transfer_seconds", 0.5)
        told.count("vllm_disagg_kv_holds_total", 2, label="granted")
        told.gauge("vllm_disagg_kv_held_blocks", held)

    first.aggregate(second)

    assert first.data["vllm_disagg_kv_transfer_seconds"] == [0.5, 0.5]
    assert first.data["vllm_disagg_kv_holds_total{granted}"] == 4
    assert first.data["vllm_disagg_kv_held_blocks"] == 1
    assert first.reduce()["transfers"] == 2


def frontend(role: str) -> tuple[DisaggFrontend, dict[str, Any]]:
    settings = EngineSettings(role=role, key_file=None)  # type: ignore[arg-type]
    transfer = SimpleNamespace(kv_connector_extra_config=settings.to_extra_config(), engine_id=f"{role}-run")
    app = SimpleNamespace(state=SimpleNamespace(vllm_config=SimpleNamespace(kv_transfer_config=transfer)))

    async def rest(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "vllm"})

    return DisaggFrontend(rest), {"type": "http", "app": app}


async def call(role: str, method: str, path: str, body: bytes = b"") -> list[dict[str, Any]]:
    middleware, scope = frontend(role)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    try:
        await middleware({**scope, "method": method, "path": path}, receive, send)
    finally:
        if middleware._context is not None:
            middleware._context.destroy(linger=0)
    return sent


@pytest.mark.parametrize(("method", "path"), [("POST", STATUS_PATH), ("GET", RELEASE_PATH), ("GET", "/v1/models")])
async def test_other_routes_are_vllms(method: str, path: str) -> None:
    assert await call("prefill", method, path) == [{"type": "vllm"}]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"transfer_id": 7}', b'{"transfer_id": "../x"}', b'{"transfer_id": "a"}' + b" " * 5000]
)
async def test_a_malformed_release_is_a_bad_request(body: bytes) -> None:
    start, answer = await call("prefill", "POST", RELEASE_PATH, body)

    assert start["status"] == 400
    assert b"transfer_id" in answer["body"]


async def test_a_decode_instance_has_nothing_to_release() -> None:
    body = json.dumps({"transfer_id": new_transfer_id()}).encode()

    start, answer = await call("decode", "POST", RELEASE_PATH, body)

    assert (start["status"], json.loads(answer["body"])) == (200, {"released": False})


async def test_a_decode_instance_is_introduced_to_a_prefill_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, "k" * 64)
    start, answer = await call("decode", "GET", INTRODUCE_PATH)
    assert start["status"] == 200

    start, answer = await call("prefill", "POST", INTRODUCE_PATH, answer["body"])
    assert start["status"] == 200
    raw = json.loads(answer["body"])["introduction"]
    told, _ = check_introduction(raw, load_key(None), engine_id=EngineId("decode-run"), now_s=time.monotonic())

    assert (told.engine_id, told.control) == ("prefill-run", "tcp://127.0.0.1:14579")


@pytest.mark.parametrize(
    ("role", "method", "body", "status"),
    [
        ("prefill", "GET", b"", 409),
        ("prefill", "POST", b"", 400),
        ("prefill", "POST", b'{"introduction": "x"}', 400),
        ("prefill", "POST", b'{"challenge": "tcp://127.0.0.1:1"}', 403),
        ("prefill", "POST", b'{"challenge": 7}', 400),
        ("decode", "POST", b'{"challenge": "x"}', 400),
        ("decode", "POST", b'{"introduction": "x"}' + b" " * 5000, 400),
    ],
)
async def test_what_is_no_introduction_is_refused(
    role: str, method: str, body: bytes, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_ENV, "k" * 64)
    start, answer = await call(role, method, INTRODUCE_PATH, body)

    assert start["status"] == status
    assert json.loads(answer["body"])["error"]


async def test_an_introduction_to_an_engine_that_does_not_answer_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_ENV, "k" * 64)
    monkeypatch.setattr("vllm_disagg.frontend.INTRODUCE_TIMEOUT_S", 0.2)
    start, _ = await call("decode", "POST", INTRODUCE_PATH, b'{"introduction": "x"}')

    assert start["status"] == 504


def test_the_engine_learns_once_how_to_be_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine import EngineCoreRequestType
    from vllm.v1.engine.core import EngineCoreProc

    from vllm_disagg.connector import DisaggConnector

    read = []
    monkeypatch.setattr(EngineCoreProc, "_process_input_queue", lambda self: read.append(self))
    wakeup.install()
    wakeup.install()
    told: list[Any] = []
    monkeypatch.setattr(DisaggConnector, "on_wake", lambda self, wake: told.append(wake))
    connector = DisaggConnector.__new__(DisaggConnector)
    engine = SimpleNamespace(
        scheduler=SimpleNamespace(connector=connector), input_queue=queue.Queue(), batch_queue=None
    )

    EngineCoreProc._process_input_queue(engine)
    EngineCoreProc._process_input_queue(engine)
    (wake,) = told
    wake()

    assert read == [engine, engine]
    assert engine.input_queue.get_nowait() == (EngineCoreRequestType.WAKEUP, None)


class Parked(SafetyMixin):
    """A scheduler that has nothing but parked requests."""

    only_awaits_kv = True

    def __init__(self) -> None:
        self.connector = None


def test_an_engine_that_awaits_kv_sleeps_until_something_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.core import EngineCoreProc

    handled: list[Any] = []
    monkeypatch.setattr(EngineCoreProc, "_process_input_queue", lambda self: handled.append("read"))
    wakeup.install()
    scheduler = Parked()

    def handle(*item: Any) -> None:
        handled.append(item)
        scheduler.only_awaits_kv = item != ("last", None)

    engine = SimpleNamespace(
        scheduler=scheduler, batch_queue=None, input_queue=queue.Queue(), _handle_client_request=handle
    )
    loop = threading.Thread(target=EngineCoreProc._process_input_queue, args=(engine,))
    monkeypatch.setattr(wakeup, "LONGEST_SLEEP_S", 60.0)

    loop.start()
    loop.join(timeout=0.1)
    assert loop.is_alive() and handled == ["read"]
    engine.input_queue.put(("abort", ["a"]))  # it still could do nothing
    engine.input_queue.put(("last", None))
    loop.join(timeout=10.0)

    assert not loop.is_alive() and handled == ["read", ("abort", ["a"]), ("last", None)]


@pytest.mark.parametrize(("parked", "in_flight"), [(True, None), (False, None), (True, ["a batch"])])
def test_an_engine_never_sleeps_for_long_nor_while_batches_are_in_flight(
    monkeypatch: pytest.MonkeyPatch, parked: bool, in_flight: list[str] | None
) -> None:
    from vllm.v1.engine.core import EngineCoreProc

    monkeypatch.setattr(EngineCoreProc, "_process_input_queue", lambda self: "read")
    monkeypatch.setattr(wakeup, "LONGEST_SLEEP_S", 0.0 if parked and not in_flight else 60.0)
    wakeup.install()
    scheduler = Parked()
    monkeypatch.setattr(Parked, "only_awaits_kv", parked)
    engine = SimpleNamespace(scheduler=scheduler, batch_queue=in_flight, input_queue=queue.Queue())

    assert EngineCoreProc._process_input_queue(engine) == "read"


def test_an_engine_with_another_connector_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.core import EngineCoreProc

    monkeypatch.setattr(EngineCoreProc, "_process_input_queue", lambda self: "read")
    wakeup.install()
    engine = SimpleNamespace(scheduler=SimpleNamespace(connector=None))

    assert EngineCoreProc._process_input_queue(engine) == "read"
