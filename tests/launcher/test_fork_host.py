"""A fork host ends with whoever started it, however that ends. No vLLM is imported: its engines only sleep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vllm_disagg.launcher.plan import FORKED_ENGINE_COMMAND

from .helpers import MARK, assert_gone, marked, wait_for

HOST = textwrap.dedent(
    """
    import subprocess, sys
    from vllm_disagg.launcher import fork_host, serve

    def engine(arguments):
        core = subprocess.Popen(["sleep", "600"])
        print("serving", flush=True)
        core.wait()

    serve.run_vllm_serve = engine
    fork_host._preload = fork_host._fork_engine_core = lambda: None
    fork_host.main(sys.argv[1:])
    """
)
PARENT = "import subprocess, sys; subprocess.run(sys.argv[1:])"


@contextmanager
def started(command: Sequence[str], mark: str, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Nothing is left of it and of all that was started with it, however the test goes."""
    env = {**os.environ, MARK: mark, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=env, start_new_session=True, **more) as process:
        try:
            yield process
        finally:
            for each in marked(mark):
                each.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_parent_and_takes_its_engines_along(tmp_path: Path, number: signal.Signals) -> None:
    path, log, mark = tmp_path / "host.sock", tmp_path / "log", str(tmp_path)
    host = (sys.executable, "-c", HOST, str(path))
    with log.open("wb") as output, started((sys.executable, "-c", PARENT, *host), mark) as parent:
        wait_for(path.is_socket)
        with started((*FORKED_ENGINE_COMMAND, str(path), "model"), mark, stdout=output) as stand_in:
            wait_for(lambda: b"serving" in log.read_bytes())
            assert len(marked(mark)) == 5  # the parent, the fork host, an engine of two, what stands for it

            parent.send_signal(number)

            assert stand_in.wait(10) == 1
            assert_gone(mark, within_s=5)
