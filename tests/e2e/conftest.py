"""One set of engines for all end-to-end tests: 1P1D behind a proxy, and an undivided engine beside them. One fork host
for all emulated engines.

Each test runs on emulated engines and on real ones. Those marked `heavy` run on real ones only in `make test-all`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.engines import EmulatedEngine, ForkHost, Server, emulated_engine, engine, fork_host, proxy
from vllm_disagg.core.keys import create_key_file
from vllm_disagg.demo.model import smollm2_path


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What the tests talk to. `pace` is about how long its steps take, compared with the real model's."""

    prefill: Server
    decode: Server
    undivided: Server
    proxy: Server
    pace: float = 1.0

    @property
    def is_emulated(self) -> bool:
        return isinstance(self.prefill, EmulatedEngine)

    def assert_alive(self) -> None:
        for server in (self.prefill, self.decode, self.undivided, self.proxy):
            server.assert_alive()

    @contextmanager
    def slow_prefill(self) -> Iterator[None]:
        """Emulated prefill computes so fast that it has to be slowed down to be caught at it."""
        if isinstance(self.prefill, EmulatedEngine):
            self.prefill.inject({"kind": "slow", "factor": 50.0})
        try:
            yield
        finally:
            if isinstance(self.prefill, EmulatedEngine):
                self.prefill.inject()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("e2e")
            params = getattr(item, "callspec", None)
            if item.get_closest_marker("heavy") and params is not None and params.params.get("deployment") == "real":
                item.add_marker("full")


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkHost]:
    """What every emulated engine is forked from: it imports vLLM, which takes longer than all that comes after it."""
    started = fork_host(tmp_path_factory.mktemp("host"))
    started.start()
    try:
        started.wait_until_ready()
        yield started
    finally:
        started.kill()


@pytest.fixture(scope="session", params=["emulated", "real"])
def deployment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "real":
        deployed = real_deployment(folder)
    else:
        deployed = emulated_deployment(folder, request.getfixturevalue("host"))
    with deployed as running:
        yield running


@contextmanager
def real_deployment(folder: Path) -> Iterator[Deployment]:
    model, key_file = smollm2_path(), folder / "key"
    create_key_file(key_file)
    roles = ("prefill", "decode", None)
    engines = [
        engine(role or "undivided", model=model, index=index, folder=folder, key_file=key_file, role=role)
        for index, role in enumerate(roles)
    ]
    with ExitStack() as stack:
        yield _started(stack, engines, folder)


@contextmanager
def emulated_deployment(folder: Path, host: ForkHost) -> Iterator[Deployment]:
    key_file = folder / "key"
    create_key_file(key_file)
    engines = [
        emulated_engine(role or "undivided", host=host, folder=folder, key_file=key_file, role=role)
        for role in ("prefill", "decode", None)
    ]
    with ExitStack() as stack:
        yield _started(stack, engines, folder, pace=0.05)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One emulated engine of each role, and the proxy in front."""

    prefill: EmulatedEngine
    decode: EmulatedEngine
    proxy: Server


@contextmanager
def emulated_pair(folder: Path, host: ForkHost, prefill_flags: Sequence[str] = ()) -> Iterator[Pair]:
    key_file = folder / "key"
    create_key_file(key_file)
    flags = {"prefill": prefill_flags, "decode": ()}
    with ExitStack() as stack:
        prefill, decode = (
            emulated_engine(role, host=host, folder=folder, key_file=key_file, role=role, flags=flags[role])
            for role in ("prefill", "decode")
        )
        for server in (prefill, decode):
            stack.callback(server.kill)
            server.start()
        for server in (prefill, decode):
            server.wait_until_ready()
        front = proxy(prefill=[prefill], decode=[decode], folder=folder)
        stack.callback(front.kill)
        front.start()
        front.wait_until_ready("/ready")
        yield Pair(prefill=prefill, decode=decode, proxy=front)


def _started(stack: ExitStack, engines: Sequence[Server], folder: Path, *, pace: float = 1.0) -> Deployment:
    prefill, decode, undivided = engines
    for server in engines:
        stack.callback(server.kill)
        server.start()
    for server in engines:
        server.wait_until_ready()
    front = proxy(prefill=[prefill], decode=[decode], folder=folder)
    stack.callback(front.kill)
    front.start()
    front.wait_until_ready("/ready")
    return Deployment(prefill=prefill, decode=decode, undivided=undivided, proxy=front, pace=pace)
