"""A connector cannot tell an emulated engine from vLLM's model runners by the order of its calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorTransferResults
from vllm.forward_context import set_forward_context
from vllm.sampling_params import SamplingParams
from vllm.v1.worker import kv_connector_model_runner_mixin as runner_v1
from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

from tests.vllm.emulated import Split, emulated
from tests.vllm.test_emulated_split import free_port, parallel
from vllm_disagg.emulation.hooks import ConnectorHooks

pytestmark = pytest.mark.vllm

LAYERS = ("layers.0", "layers.1")
FINISHED = {"gone"}

Call = tuple[str, tuple[str, ...]]
"""A method's name and the names of the keyword arguments it was given."""


def _recorded(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((name, tuple(sorted(kwargs))))
        return KVConnectorTransferResults() if name == "get_transfer_results" else None

    return method


_NAMES = [
    name for name, item in vars(KVConnectorBase_V1).items() if callable(item) and not name.startswith(("_", "bind_gpu"))
]


def recorder() -> Any:
    """A connector that does nothing but note who calls it."""
    kind = type("Recorder", (KVConnectorBase_V1,), {name: _recorded(name) for name in _NAMES})
    made = kind.__new__(kind)
    made.calls = []
    return made


def step_of(num_tokens: int, *, loads_first: bool) -> Any:
    return SimpleNamespace(
        kv_connector_metadata=object(),
        has_sync_kv_loads=loads_first,
        total_num_scheduled_tokens=num_tokens,
        num_scheduled_tokens={"one": num_tokens} if num_tokens else {},
        finished_req_ids=FINISHED,
    )


def forward(connector: Any) -> None:
    """vLLM's attention layers (`maybe_transfer_kv_layer`)."""
    for name in LAYERS:
        connector.wait_for_layer_load(name)
        connector.save_kv_layer(name, torch.zeros(1), None)


def calls_of_v1(step: Any, config: Any, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    connector = recorder()
    monkeypatch.setattr(runner_v1, "get_kv_transfer_group", lambda: connector)
    mixin = runner_v1.KVConnectorModelRunnerMixin
    connector.handle_preemptions(step.kv_connector_metadata)  # in `GPUModelRunner.execute_model`
    if step.total_num_scheduled_tokens:
        with set_forward_context(None, config), mixin._get_kv_connector_output(step):
            forward(connector)
    else:
        mixin.kv_connector_no_forward(step, config)
    return list(connector.calls)


def calls_of_v2(step: Any, config: Any, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    runner = ActiveKVConnector.__new__(ActiveKVConnector)
    runner.vllm_config, runner.kv_connector = config, recorder()
    runner._pending_load_kwargs, runner._disabled = None, False
    if step.total_num_scheduled_tokens:
        batch = SimpleNamespace(idx_mapping=torch.arange(1), req_ids=["one"], num_tokens=5)
        runner.pre_forward(step, batch)
        forward(runner.kv_connector)
        runner.finish_forward()
        runner.post_forward(step.finished_req_ids)
    else:
        runner.no_forward(step)
    return list(runner.kv_connector.calls)


RUNNERS = {"v1": calls_of_v1, "v2": calls_of_v2}


@pytest.mark.parametrize(("order", "num_tokens", "loads_first"), itertools.product(("v1", "v2"), (5, 0), (False, True)))
def test_calls_come_as_from_vllms_runner(
    order: Any, num_tokens: int, loads_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = emulated()
    step, connector = step_of(num_tokens, loads_first=loads_first), recorder()
    hooks = ConnectorHooks(connector, engine.config, {name: torch.zeros(1) for name in LAYERS}, order)

    hooks.before_forward(step)
    if num_tokens:
        hooks.around_layers()
    hooks.forward_done()
    hooks.after(step)

    assert connector.calls == RUNNERS[order](step, engine.config, monkeypatch)
    engine.stop()


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("order", ["v1", "v2"])
def test_a_running_engine_calls_in_that_order_step_by_step(
    order: str, tp: int, pp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = Split(tmp_path, free_port(), [*parallel(tp, pp), "--emulate-hook-order", order])
    seen = []
    for worker in split.decode.workers:
        connector, calls = worker.hooks._connector, list[str]()
        for name in _NAMES:
            if name not in ("get_handshake_metadata", "register_kv_caches"):
                monkeypatch.setattr(connector, name, _noted(name, getattr(connector, name), calls))
        seen.append(calls)

    split.answers([[4500] * 40], [SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)])
    split.settle()

    num_layers = 2 // pp
    expected = {
        num_tokens: [
            name
            for name, _ in RUNNERS[order](step_of(num_tokens, loads_first=False), split.decode.config, monkeypatch)
            if name not in ("wait_for_layer_load", "save_kv_layer")
        ]
        for num_tokens in (0, 1)
    }
    for calls in seen:
        steps = _steps(calls)
        assert len(steps) == len(split.decode.decisions)
        for step, decision in zip(steps, split.decode.decisions, strict=True):
            of_layers = [name for name in step if name in ("wait_for_layer_load", "save_kv_layer")]
            assert of_layers == ["wait_for_layer_load", "save_kv_layer"] * (num_layers if decision.tokens else 0)
            assert [name for name in step if name not in of_layers] == expected[1 if decision.tokens else 0]
        assert any(not decision.tokens for decision in split.decode.decisions), "a step that only receives"
    split.stop()


def _noted(name: str, method: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def noting(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return method(*args, **kwargs)

    return noting


def _steps(calls: list[str]) -> list[list[str]]:
    """Calls of the hooks alone, cut where a step begins."""
    steps: list[list[str]] = []
    for name in calls:
        if name == "handle_preemptions":
            steps.append([])
        steps[-1].append(name)
    return [_without_inner(step) for step in steps]


def _without_inner(step: list[str]) -> list[str]:
    """`get_transfer_results` asks `get_finished` by itself."""
    return [name for name in step if name not in ("get_finished", "has_connector_metadata")]
