"""`vllm-disagg up` with real engines: it serves, it says what is wrong, and nothing outlives it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.engines import ForkHost
from vllm_disagg.demo.model import tiny_llama_path
from vllm_disagg.launcher.machine import free_ports
from vllm_disagg.launcher.plan import FORKED_ENGINE_COMMAND

pytestmark = pytest.mark.e2e

READY_LINE = "Ctrl-C stops everything"
START_S, END_S = 240, 60


class Up:
    """A running `vllm-disagg up`, and every process that was ever seen below it."""

    def __init__(self, log_dir: Path, model: str, *arguments: str) -> None:
        self.port, self.model = free_ports(1)[0], model
        self.log_dir = log_dir
        self._output = (log_dir / "up.out").open("w+")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm_disagg", "up", model, "--port", str(self.port)),
                *("--log-dir", str(log_dir), "--engine-arg=--max-model-len=1024", *arguments),
            ],
            stdout=subprocess.DEVNULL,
            stderr=self._output,
        )

    @property
    def output(self) -> str:
        return (self.log_dir / "up.out").read_text()

    def wait_until(self, text: str, *, within_s: float = START_S) -> None:
        wait_for(lambda: text in self.output or self.process.poll() is not None, within_s)
        assert text in self.output, self.output

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def engine_port(self, name: str) -> int:
        """Where one engine's API server listens."""
        return int(self.output.partition(f"{name}: ")[2].partition("http://127.0.0.1:")[2].partition(",")[0])

    def engine(self, name: str) -> psutil.Process:
        """The API server of one engine."""
        port = str(self.engine_port(name))
        return next(
            process
            for process in self.descendants()
            if process.cmdline()[1:4] == ["-m", "vllm_disagg", "serve"] and port in process.cmdline()
        )

    def ask(self) -> tuple[str | None, dict[str, Any]]:
        """One completion: the route it took, and its body."""
        headers, answer = self.completion()
        return headers["x-disagg-route"], answer

    def completion(self) -> tuple[dict[str, str], dict[str, Any]]:
        """One completion: its headers and body."""
        body = {"model": self.model, "prompt": "abc " * 20, "max_tokens": 5, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return {name.lower(): value for name, value in answer.headers.items()}, json.load(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._output.close()


def listens(process: psutil.Process, port: int) -> bool:
    try:
        return any(each.laddr.port == port for each in process.net_connections("tcp") if each.status == "LISTEN")
    except psutil.Error:
        return False


def wait_for(condition: Any, within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s, "timed out"
        time.sleep(0.05)  # bounded polling of other processes


def assert_gone(processes: list[psutil.Process], *, within_s: float = END_S) -> None:
    def living() -> list[psutil.Process]:
        return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]

    wait_for(lambda: not living(), within_s)


@contextmanager
def up(tmp_path: Path, *arguments: str, model: str | None = None) -> Iterator[Up]:
    real = ("--engine-arg=--kv-cache-memory-bytes=268435456",)
    running = (
        Up(tmp_path, str(tiny_llama_path()), *real, *arguments) if model is None else Up(tmp_path, model, *arguments)
    )
    try:
        yield running
    finally:
        running.close()


def test_it_serves_split_requests_and_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    with up(tmp_path) as running:
        running.wait_until(READY_LINE)
        route, answer = running.ask()
        everything = running.descendants()

        running.process.send_signal(signal.SIGINT)

        assert route == "split" and answer["usage"]["completion_tokens"] == 5
        assert running.process.wait(END_S) == 0
        assert len(everything) >= 10  # two engines of three processes, the proxy, three wardens
        assert_gone(everything, within_s=1)


@pytest.mark.full
def test_an_engines_death_is_reported_and_a_killed_launcher_leaves_nothing(tmp_path: Path) -> None:
    with up(tmp_path) as running:
        running.wait_until(READY_LINE)
        everything = running.descendants()
        api_server = running.engine("prefill-0")
        its_processes = [api_server, *api_server.children(recursive=True)]

        api_server.kill()
        running.wait_until("the others go on serving", within_s=30)

        assert "prefill-0 was killed by signal 9" in running.output
        assert_gone(its_processes, within_s=1)
        assert running.ask()[0] == "local"

        running.process.kill()

        assert_gone(everything)


@pytest.mark.full
def test_a_launcher_killed_while_engines_start_leaves_nothing(tmp_path: Path) -> None:
    with up(tmp_path) as running:
        wait_for(lambda: len(running.descendants()) >= 8, START_S)  # engine cores and workers are there
        everything = running.descendants()

        running.process.kill()

        assert_gone(everything)


def test_emulated_engines_serve_and_are_started_again_and_a_killed_launcher_leaves_nothing(tmp_path: Path) -> None:
    asked = ("--emulate", "tiny", "--decode", "2", "--dilation", "2", "--emulate-link", "25g", "--restart")
    with up(tmp_path, *asked, model="tiny") as running:
        running.wait_until(READY_LINE)
        headers, answer = running.completion()

        assert headers["x-disagg-route"] == "split" and answer["usage"]["completion_tokens"] == 5
        assert headers["x-vllm-disagg-emulated"] == "emulated tiny dilation=2"

        api_server = next(each for each in running.descendants() if listens(each, running.engine_port("prefill-0")))
        api_server.kill()
        running.wait_until("prefill-0: starting again", within_s=30)

        assert "prefill-0 was killed by signal 9" in running.output
        wait_for(lambda: running.ask()[0] == "split", 30)
        everything = running.descendants()
        # a fork host, three engines of two processes, what stands for them, five wardens, a proxy
        assert len(everything) >= 16

        running.process.kill()

        assert_gone(everything)


@pytest.mark.full
def test_a_decode_engine_of_another_dtype_is_refused(tmp_path: Path) -> None:
    asked = ("--emulate", "tiny", "--prefill-arg=--dtype=float32", "--decode-arg=--dtype=bfloat16")
    with up(tmp_path, *asked, model="tiny") as running:
        assert running.process.wait(START_S) == 2

        errors = [line for line in running.output.splitlines() if line.startswith("error: ")]
        assert errors == [
            "error: the engines do not fit: dtype is 'float32' here and 'bfloat16' at the peer; "
            "start both with the same dtype"
        ]
        assert running.output.endswith(errors[0] + "\n")


@pytest.mark.full
def test_an_argument_vllm_refuses_is_reported(tmp_path: Path) -> None:
    with up(tmp_path, "--emulate", "tiny", "--decode-arg=--no-such-flag", model="tiny") as running:
        assert running.process.wait(START_S) == 1

        assert "decode-0 ended with exit status 2 while starting" in running.output
        assert "unrecognized arguments: --no-such-flag" in running.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("org/model", "--kv-role", "both"), "invalid choice: 'both'"),
        pytest.param(("org/model", "--kv-lease-s", "5"), "--kv-lease-s needs --kv-role", marks=pytest.mark.full),
    ],
)
def test_serve_refuses_wrong_flags_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vllm_disagg", "serve", *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_serve_shows_vllms_help_with_our_flags(host: ForkHost) -> None:
    done = subprocess.run(
        [*FORKED_ENGINE_COMMAND, str(host.socket), "--help=VllmDisagg"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip

    for flag in ("--kv-role", "--kv-control-port", "--kv-key-file"):
        assert flag in done.stdout
