"""`vllm-disagg doctor` on engines as they run: healthy ones, and some with something to change."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.contract.control_fire import GREETING_BYTES, bombard, strangers
from tests.e2e.conftest import Deployment
from tests.e2e.engines import EmulatedEngine, ForkHost, Server, emulated_engine
from vllm_disagg.connector.secure import curve_keys
from vllm_disagg.core.keys import create_key_file, load_key
from vllm_disagg.core.types import EngineId


def doctor(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "vllm_disagg", "doctor", *arguments],
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    print(done.stdout, done.stderr)
    return done.returncode, done.stdout


def examined(prefill: Sequence[Server], decode: Sequence[Server]) -> tuple[int, dict[str, Any]]:
    key_file = decode[0].argv[decode[0].argv.index("--kv-key-file") + 1]
    urls = [part for server in prefill for part in ("--prefill", server.url)]
    urls += [part for server in decode for part in ("--decode", server.url)]
    code, output = doctor(*urls, "--key-file", key_file, "--json")
    return code, json.loads(output)


def test_a_healthy_pair_is_healthy_and_goes_on_serving(deployment: Deployment) -> None:
    before = deployment.prefill.metrics("vllm_disagg_kv_held")

    code, told = examined([deployment.prefill], [deployment.decode])

    assert (code, told["healthy"], told["problems"]) == (0, True, [])
    [source] = told["pairs"][0]["report"]["workers"][0]["sources"]
    assert source["intact"] and source["bytes_per_s"] > 0 and len(source["reads"]) == 5
    assert all(told["pairs"][0]["report"]["lease"].values())
    assert deployment.prefill.metrics("vllm_disagg_kv_held") == before
    deployment.assert_alive()


def test_bytes_that_change_on_their_way_are_a_problem(deployment: Deployment) -> None:
    if not isinstance(deployment.decode, EmulatedEngine):
        pytest.skip("faults are injected into emulated engines")
    deployment.decode.inject({"kind": "corrupt_read", "every": 1})
    try:
        code, told = examined([deployment.prefill], [deployment.decode])
    finally:
        deployment.decode.inject()

    assert code == 1
    assert "not the bytes it owns" in told["problems"][0]["what"]


@pytest.fixture(scope="module")
def tcp(host: ForkHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server, Server]]:
    """A prefill engine, a decode engine that fits it, both forced to TCP, and one with other blocks."""
    folder = tmp_path_factory.mktemp("tcp")
    create_key_file(folder / "key")
    with ExitStack() as stack:
        prefill, fitting, misfit = (
            emulated_engine(name, host=host, folder=folder, key_file=folder / "key", role=role, block_size=block_size)
            for name, role, block_size in (("p", "prefill", 32), ("d", "decode", 32), ("other", "decode", 16))
        )
        for engine in (prefill, fitting, misfit):
            engine.env["UCX_TLS"] = "tcp"
            stack.callback(engine.kill)
            engine.start()
        for engine in (prefill, fitting, misfit):
            engine.wait_until_ready()
        yield prefill, fitting, misfit


def test_a_pair_forced_to_tcp_is_told_what_is_slow_and_what_to_unset(tcp: tuple[Server, Server, Server]) -> None:
    prefill, fitting, _ = tcp

    code, told = examined([prefill], [fitting])

    [problem] = told["problems"]
    assert code == 1
    assert problem["what"].startswith("slow transport") and "one host" in problem["what"]
    assert "UCX_TLS=tcp" in problem["fix"]
    assert told["pairs"][0]["report"]["workers"][0]["sources"][0]["intact"]


def test_an_engine_that_does_not_fit_is_refused_by_name_on_both_sides_and_the_others_go_on(
    tcp: tuple[Server, Server, Server],
) -> None:
    prefill, fitting, misfit = tcp

    code, told = examined([prefill], [misfit, fitting])

    whats = [problem["what"] for problem in told["problems"] if problem["where"] == "decode 0 <- prefill 0"]
    assert code == 1
    assert whats == ["the engines refuse each other: block size is '32' on prefill and '16' on decode"]
    assert "block size is '32' here and '16' at the peer" in prefill.log.read_text()
    assert told["pairs"][1]["report"]["stage"] == "done"  # the fitting pair, from the same prefill engine


def test_a_deployment_key_that_differs_is_named(tcp: tuple[Server, Server, Server], tmp_path: Path) -> None:
    create_key_file(tmp_path / "other")

    code, output = doctor("--prefill", tcp[0].url, "--decode", tcp[1].url, "--key-file", str(tmp_path / "other"))

    assert code == 1
    assert output.count("it has another deployment key than this command") == 2


@pytest.mark.full
def test_an_engine_under_fire_is_healthy_and_goes_on_serving(deployment: Deployment) -> None:
    key_file = deployment.decode.argv[deployment.decode.argv.index("--kv-key-file") + 1]
    keys = curve_keys(load_key(key_file))
    _, before = examined([deployment.prefill], [deployment.decode])
    identity = before["engines"][0]["identity"]
    address, engine_id = identity["control"], EngineId(identity["engine_id"])

    with strangers(address, curve_keys(b"s" * 32), num_sockets=1000, num_zmq=100) as crowd:
        fire = bombard(address, keys, engine_id, num_frames=100_000, seed=3)
        code, told = examined([deployment.prefill], [deployment.decode])
        crowd.listen(0.2)

    greeting_s = told["pairs"][0]["report"]["greeting_s"]
    print(f"{fire.num_frames} frames in {fire.seconds:.1f} s; then greeted in {1000 * greeting_s:.1f} ms")
    assert (code, told["problems"]) == (0, [])
    assert greeting_s < 5.0
    assert crowd.answers == [] and all(len(heard) <= GREETING_BYTES for heard in crowd.heard.values())
    deployment.assert_alive()
