"""What the doctor makes of reports, and of URLs where no healthy engine answers."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vllm_disagg.core.host import host_facts
from vllm_disagg.core.keys import create_key_file, load_key
from vllm_disagg.core.probe import (
    PROBE_VERSION,
    Identity,
    LeaseReport,
    OrderRefused,
    PairReport,
    ProbeOrder,
    ReadTiming,
    SourceReport,
    WorkerReport,
    check_order,
    sign_order,
)
from vllm_disagg.core.types import EngineId
from vllm_disagg.doctor.ask import Unwell, identify
from vllm_disagg.doctor.diagnose import diagnose
from vllm_disagg.doctor.findings import Engine, Examination, Pair, as_json, as_text
from vllm_disagg.doctor.run import run_doctor
from vllm_disagg.doctor.settings import DoctorSettings
from vllm_disagg.errors import ConfigError
from vllm_disagg.launcher.running import find_running, write_note

KEY = b"k" * 32
ONE_HOST = {"boot": "b1", "pid namespace": "pid:[1]"}


def identity(role: str = "prefill", *, transport: str = "auto", facts: dict[str, str] | None = None) -> Identity:
    return Identity(
        role=role, engine_id=EngineId(role), control="tcp://127.0.0.1:14579" if role == "prefill" else "",
        transport=transport, fingerprint={"dtype": "float32"}, facts=ONE_HOST if facts is None else facts,
    )  # fmt: skip


def report(*, wire: str = "cma", rate: float = 4e9, **fields: Any) -> PairReport:
    each_s = fields.pop("each_s", 1e-6)
    reads = tuple(
        ReadTiming(copy_bytes=size, num_copies=count, seconds=size * count / rate + count * each_s)
        for size, count in ((16 << 20, 1), (4 << 10, 1024))
    )
    source = {"peer": "p/pp0tp0", "wire": wire, "reads": reads, "intact": True, **fields.pop("source", {})}
    workers = (WorkerReport(sources=(SourceReport(**source),), copy_bytes_per_s=8e9),)
    lease = LeaseReport(renews=True, guarded=True, proves=True, single_use=True)
    base = {"stage": "done", "workers": workers, "lease": lease, "round_trips_s": (0.001, 0.002)}
    return PairReport(**{**base, **fields})


def found(told: PairReport, *, prefill: Identity | None = None, decode: Identity | None = None) -> list[str]:
    findings = diagnose(prefill or identity(), decode or identity("decode"), told)
    return [f"{finding.severity}: {finding.what} / {finding.fix}" for finding in findings]


def test_a_healthy_pair_has_no_findings() -> None:
    assert found(report()) == []
    assert found(report(wire="rdma"), decode=identity("decode", facts={"boot": "b2"})) == []
    assert found(report(wire="unknown")) == []


@pytest.mark.parametrize("wire", ["tcp", "tcp or shared memory", "gloo", "unknown"])
def test_tcp_on_one_host_is_named_with_the_variable_to_unset(wire: str) -> None:
    forced = {**ONE_HOST, "UCX_TLS": "tcp"}

    [text] = found(
        report(wire=wire, rate=1.5e9), prefill=identity(facts=forced), decode=identity("decode", facts=forced)
    )

    assert text.startswith("problem: slow transport")
    assert "unset UCX_TLS=tcp in the environment of prefill and decode" in text


@pytest.mark.parametrize(
    ("value", "is_problem"),
    [("tcp", True), ("tcp,posix,sysv,self", True), ("^cma", True), ("all", False), ("tcp,cma", False), ("^ib", False)],
)
def test_only_values_that_keep_cma_out_are_blamed(value: str, is_problem: bool) -> None:
    prefill = identity(facts={**ONE_HOST, "UCX_TLS": value})

    assert bool(found(report(wire="unknown"), prefill=prefill)) is is_problem


@pytest.mark.parametrize(
    ("facts", "fix"),
    [
        ({"boot": "b1", "pid namespace": "pid:[2]"}, "--pid=host"),
        ({**ONE_HOST, "ptrace scope": "1"}, "ptrace_scope is 1"),
        (ONE_HOST, "SYS_PTRACE"),
    ],
)
def test_what_keeps_containers_from_cma_is_guessed_from_facts(facts: dict[str, str], fix: str) -> None:
    [text] = found(report(wire="tcp or shared memory"), prefill=identity(facts=facts), decode=identity("decode"))

    assert "problem" in text and fix in text


def test_tcp_between_hosts_is_a_problem_only_where_both_have_rdma() -> None:
    here, there = {"boot": "b1", "rdma": "mlx5_0:1"}, {"boot": "b2", "rdma": "mlx5_1:1"}

    [text] = found(report(wire="tcp"), prefill=identity(facts=here), decode=identity("decode", facts=there))
    assert "problem" in text and "mlx5_0:1" in text and "mlx5_1:1" in text

    [text] = found(report(wire="tcp"), prefill=identity(facts=here), decode=identity("decode", facts={"boot": "b2"}))
    assert text.startswith("note")


def test_messages_that_were_asked_for_are_no_problem() -> None:
    [text] = found(report(wire="gloo"), prefill=identity(transport="nccl"), decode=identity("decode", transport="nccl"))

    assert text.startswith("note")


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (report(source={"intact": False}), "not the bytes it owns"),
        (report(source={"error": "link down"}), "link down"),
        (report(lease=LeaseReport(renews=True, guarded=True, proves=True, single_use=False)), "outlived its release"),
        (report(lease=LeaseReport(renews=True, guarded=False, proves=True, single_use=True)), "wrong nonce"),
        (PairReport(stage="greeting", cause="handshake_timeout"), "no answer from prefill's control channel"),
        (
            PairReport(stage="greeting", cause="incompatible", factor="dtype", prefill="float32", decode="bfloat16"),
            "dtype is 'float32' on prefill and 'bfloat16' on decode",
        ),
        (PairReport(stage="connecting", cause="peer_unreachable", error="no"), "stopped while connecting"),
        (PairReport(stage="reading", cause="something new"), "something new"),
    ],
)
def test_each_failure_is_one_problem_with_something_to_change(told: PairReport, words: str) -> None:
    [text] = found(told)

    assert text.startswith("problem") and words in text and not text.endswith("/ ")


def test_a_loopback_address_is_blamed_where_decode_runs_elsewhere() -> None:
    told = PairReport(stage="greeting", cause="handshake_timeout")

    [text] = found(told, decode=identity("decode", facts={"boot": "b2"}))

    assert "--kv-control-host" in text and "another host" in text


def test_what_only_the_api_servers_know_is_compared_too() -> None:
    prefill = msgspec.structs.replace(identity(), fingerprint={"dtype": "float32", "chat rendering": "a"})

    [text] = found(report(), prefill=prefill)

    assert "chat rendering" in text


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (report(round_trips_s=(0.2, 0.3)), "round trip"),
        (report(wire="tcp", source={"carrier": "nixl", "sent_by_owner": True}), "can end prefill's process"),
        (report(each_s=1e-3), "each copy"),
        (report(rate=0.1e9), "less than it usually carries"),
    ],
)
def test_what_is_worth_knowing_is_a_note(told: PairReport, words: str) -> None:
    assert any(text.startswith("note") and words in text for text in found(told))


# Text and JSON.


def examined(told: PairReport) -> Examination:
    prefill, decode = identity(), identity("decode")
    return Examination(
        engines=(
            Engine(role="prefill", number=0, url="http://p", identity=prefill),
            Engine(role="decode", number=0, url="http://d", identity=decode),
        ),
        pairs=(
            Pair(
                prefill="prefill 0",
                decode="decode 0",
                report=told,
                findings=tuple(diagnose(prefill, decode, told)),
            ),
        ),
    )


def test_text_ends_with_the_verdict() -> None:
    assert list(as_text(examined(report())))[-1] == "healthy: 1 pair examined"

    lines = list(as_text(examined(report(wire="tcp"))))
    assert lines[-1] == "1 problem, 1 pair examined"
    assert any(line.startswith("problem: decode 0 <- prefill 0: slow transport") for line in lines)


def test_json_tells_the_same_and_the_figures() -> None:
    told = json.loads(as_json(examined(report(wire="tcp"))))

    assert told["healthy"] is False and told["version"] == 1
    assert told["problems"][0]["where"] == "decode 0 <- prefill 0"
    source = told["pairs"][0]["report"]["workers"][0]["sources"][0]
    assert source["bytes_per_s"] == pytest.approx(4e9, rel=0.01)
    assert source["seconds_per_copy"] == pytest.approx(1e-6, rel=0.01)
    assert [read["copy_bytes"] for read in source["reads"]] == [16 << 20, 4 << 10]


# Orders.


def test_orders_are_signed() -> None:
    order = ProbeOrder(version=PROBE_VERSION, task="identify", nonce="n")
    raw = sign_order(order, KEY)

    assert check_order(raw, KEY) == order
    for spoiled in (raw[:-4], b"", b"\xff" * 100, raw.swapcase(), sign_order(order, b"s" * 32), raw * 100):
        with pytest.raises(OrderRefused) as caught:
            check_order(spoiled, KEY)
        assert not caught.value.signed
    with pytest.raises(OrderRefused, match="version") as caught:
        check_order(sign_order(msgspec.structs.replace(order, version=9), KEY), KEY)
    assert caught.value.signed


def test_facts_leave_out_what_is_not_there_and_secrets(tmp_path: Path) -> None:
    state = tmp_path / "sys/class/infiniband/mlx5_0/ports/1/state"
    state.parent.mkdir(parents=True)
    state.write_text("4: ACTIVE\n")
    down = tmp_path / "sys/class/infiniband/mlx5_1/ports/1/state"
    down.parent.mkdir(parents=True)
    down.write_text("1: DOWN\n")

    facts = host_facts({"UCX_TLS": "tcp", "VLLM_DISAGG_KEY": "secret", "HOME": "/x"}, tmp_path)

    assert facts == {"host": socket.gethostname(), "rdma": "mlx5_0:1", "UCX_TLS": "tcp"}


# URLs where no healthy engine answers. Real sockets.


@contextmanager
def answering(**routes: tuple[int, bytes]) -> Iterator[str]:
    """A web server with these answers by the last part of the path, and 404 elsewhere."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            status, body = routes.get(self.path.rsplit("/", 1)[-1], (404, b"{}"))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def refused(url: str) -> str:
    with pytest.raises(Unwell) as caught:
        identify(url, "prefill", KEY)
    return f"{caught.value.what} / {caught.value.fix}"


def test_an_engine_says_who_it_is() -> None:
    with answering(probe=(200, msgspec.json.encode(identity()))) as url:
        assert identify(url, "prefill", KEY) == identity()


@pytest.mark.parametrize(
    ("routes", "words"),
    [
        ({}, "no role in a split deployment"),
        ({"status": (200, b"{}")}, "older than this one"),
        ({"probe": (403, b'{"error": "x"}')}, "another deployment key"),
        ({"probe": (500, b"oops")}, "answers 500: oops"),
        ({"probe": (200, b"<html>")}, "another form"),
        ({"probe": (200, msgspec.json.encode(identity("decode")))}, "listed as prefill"),
    ],
)
def test_what_answers_wrongly_is_one_line(routes: dict[str, tuple[int, bytes]], words: str) -> None:
    with answering(**routes) as url:
        text = refused(url)

    assert words in text and "\n" not in text


def test_nobody_there_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    assert "connection refused" in refused(f"http://127.0.0.1:{port}")
    assert "host is not known" in refused("http://no-such-host.invalid:1")


def test_somebody_who_says_nothing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_disagg.doctor.ask.IDENTIFY_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "no answer within" in refused(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_somebody_who_does_not_speak_http_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"SSH-2.0-x\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert "HTTP" in refused(f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join()


def test_engines_that_are_down_make_the_exit_status_1(tmp_path: Path) -> None:
    create_key_file(tmp_path / "key")
    lines: list[str] = []
    settings = DoctorSettings(
        prefill=("http://127.0.0.1:1",), decode=("http://127.0.0.1:2",), key_file=str(tmp_path / "key")
    )

    assert run_doctor(settings, lines.append) == 1
    assert lines[-1] == "2 problems, 0 pairs examined"


# Settings, and the note of a running `up`.


@pytest.mark.parametrize(
    "given",
    [
        {"prefill": ("http://h:1",)},
        {"decode": ("http://h:1",)},
        {"prefill": ("h:1",), "decode": ("http://h:2",)},
        {"prefill": ("http://h:1",), "decode": ("http://h:1",)},
        {"prefill": ("http://h:1",), "decode": ("http://h:2",), "up": "x"},
    ],
)
def test_wrong_usage_is_a_setting_to_correct(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DoctorSettings(**given)


def test_no_key_is_made_by_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("VLLM_DISAGG_KEY", raising=False)
    settings = DoctorSettings(prefill=("http://127.0.0.1:1",), decode=("http://127.0.0.1:2",))

    with pytest.raises(ConfigError, match="--key-file"):
        run_doctor(settings, print)

    assert list(tmp_path.rglob("*")) == []


def test_a_running_deployment_is_found_by_its_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("vllm_disagg.launcher.running.user_folder", lambda kind: tmp_path)
    one, other = tmp_path / "up-1", tmp_path / "up-2"
    for folder in (one, other):
        folder.mkdir()
    with pytest.raises(ConfigError, match=r"no `vllm-disagg up`"):
        find_running(None)

    note = write_note(one, prefill=["http://p"], decode=["http://d"], key_file=tmp_path / "key")
    assert note.stat().st_mode & 0o077 == 0
    running = find_running(None)
    assert (running.prefill, running.decode) == (("http://p",), ("http://d",))
    assert find_running(str(one)) == running

    write_note(other, prefill=["http://p"], decode=["http://d"], key_file=tmp_path / "key")
    with pytest.raises(ConfigError, match="--up"):
        find_running(None)
    other_note = other / "deployment.json"
    other_note.write_bytes(other_note.read_bytes().replace(str(os.getpid()).encode(), b"999999999"))  # its writer died
    assert find_running(None) == running
    with pytest.raises(ConfigError, match="logs"):
        find_running(str(other))


def test_the_key_of_a_note_is_read_from_where_it_lies(tmp_path: Path) -> None:
    create_key_file(tmp_path / "key")
    write_note(tmp_path, prefill=["http://127.0.0.1:1"], decode=["http://127.0.0.1:2"], key_file=tmp_path / "key")

    assert load_key(find_running(str(tmp_path)).key_file)
    assert run_doctor(DoctorSettings(up=str(tmp_path)), lambda line: None) == 1
