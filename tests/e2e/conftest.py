"""One set of engines for all end-to-end tests: 1P1D behind a proxy, and an undivided engine beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.engines import Server, engine, proxy
from vllm_disagg.core.keys import create_key_file
from vllm_disagg.demo.model import smollm2_path


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What the tests talk to."""

    prefill: Server
    decode: Server
    undivided: Server
    proxy: Server

    def assert_alive(self) -> None:
        for server in (self.prefill, self.decode, self.undivided, self.proxy):
            server.assert_alive()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("e2e")


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("engines")
    model, key_file = smollm2_path(), folder / "key"
    create_key_file(key_file)

    def start(name: str, index: int, role: str | None) -> Server:
        return engine(name, model=model, index=index, folder=folder, key_file=key_file, role=role)

    prefill, decode = start("prefill", 0, "prefill"), start("decode", 1, "decode")
    undivided = start("undivided", 2, None)
    with ExitStack() as stack:
        for server in (prefill, decode, undivided):
            stack.callback(server.kill)
            server.start()
        for server in (prefill, decode, undivided):
            server.wait_until_ready()
        front = proxy(prefill=[prefill], decode=[decode], folder=folder)
        stack.callback(front.kill)
        front.start()
        front.wait_until_ready("/ready")
        yield Deployment(prefill=prefill, decode=decode, undivided=undivided, proxy=front)
