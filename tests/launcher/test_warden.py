"""Whatever dies, and however, no process of an engine is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from vllm_disagg.launcher import warden

from .helpers import FAKE, MARK, assert_gone, marked, wait_for

WARDEN = (sys.executable, "-I", "-S", warden.__file__)


class Started:
    def __init__(self, tmp_path: Path, mark: str, command: tuple[str, ...], grace_s: float, cpus: str) -> None:
        self.log = tmp_path / "log"
        self.process = subprocess.Popen(
            [*WARDEN, str(self.log), str(grace_s), cpus, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, MARK: mark},
            start_new_session=True,
        )

    def pid(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def wait_until_started(self) -> None:
        wait_for(lambda: self.log.exists() and b"started" in self.log.read_bytes())


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path)
    for process in marked(str(tmp_path)):
        process.kill()


@pytest.fixture
def start(tmp_path: Path, mark: str) -> Iterator[object]:
    started: list[Started] = []

    def start(*command: str, grace_s: float = 10.0, cpus: str = "-") -> Started:
        started.append(Started(tmp_path, mark, command, grace_s, cpus))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        with each.process:  # waits, and closes both pipes
            pass


def test_the_exit_status_is_the_engines(start) -> None:
    assert start(sys.executable, "-c", "raise SystemExit(7)").process.wait(10) == 7


def test_a_death_by_signal_reads_as_in_a_shell(start) -> None:
    assert start(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)").process.wait(10) == 137


def test_a_command_that_does_not_exist_is_explained_in_the_log(start) -> None:
    started = start("/no/such/program")

    assert started.process.wait(10) == 127
    assert "cannot start /no/such/program" in started.log.read_text()


def test_sigterm_ends_the_engine_politely(start, mark) -> None:
    started = start(*FAKE)
    started.wait_until_started()

    started.process.terminate()

    assert started.process.wait(5) == 128 + signal.SIGTERM
    assert_gone(mark, within_s=0.5)


def test_an_engine_and_a_grandchild_that_ignore_sigterm_are_killed_after_the_grace(start, mark) -> None:
    started = start(*FAKE, "deaf=1", "grandchild=1", grace_s=0.3)
    started.wait_until_started()
    assert len(marked(mark)) == 3

    started.process.terminate()

    assert started.process.wait(10) == 137
    assert_gone(mark, within_s=0.5)


def test_a_grandchild_in_another_session_does_not_outlive_a_crashed_engine(start, mark) -> None:
    started = start(*FAKE, "grandchild=1", "die_after_s=0.5")

    assert started.process.wait(10) == 5
    assert_gone(mark, within_s=0.5)


def test_the_end_of_the_launcher_is_the_end_of_the_engine(start, mark) -> None:
    started = start(*FAKE, "deaf=1", "grandchild=1", grace_s=0.3)
    started.wait_until_started()

    started.process.stdin.close()

    assert_gone(mark, within_s=10)


def test_a_second_request_kills_at_once(start, mark) -> None:
    started = start(*FAKE, "deaf=1", grace_s=600)
    started.wait_until_started()

    started.process.terminate()
    started.process.send_signal(signal.SIGUSR1)

    assert started.process.wait(5) == 137
    assert_gone(mark, within_s=0.5)


def test_the_engine_itself_dies_with_a_killed_warden(start, mark) -> None:
    started = start(*FAKE, "deaf=1")
    pid = started.pid()
    started.wait_until_started()

    started.process.kill()

    wait_for(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_every_process_of_an_engine_stays_on_its_cpus(start, mark) -> None:
    cpu = min(os.sched_getaffinity(0))
    child = "import os; print(os.sched_getaffinity(0))"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    warden = start(sys.executable, "-c", script, cpus=str(cpu))

    assert warden.process.wait(timeout=20) == 0
    assert warden.log.read_text() == f"{{{cpu}}}\n"
