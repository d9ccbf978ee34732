"""`vllm-disagg profile` on emulated engines.

How close the step times come to what the device was told to be is printed where it depends on how busy the host is;
`tests/contract/test_profiler.py` holds the profiler to it where it does not.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.engines import ForkHost, emulated_engine
from vllm_disagg.core.keys import create_key_file
from vllm_disagg.core.latency import LatencyModel, work_of
from vllm_disagg.planner.fit import judge_profile
from vllm_disagg.profiles import load_profile

TRUTH = "opt-13b-a100-80g"
DILATION = 4
"""So that a host that does other work, too, is late by little of a step."""

DEVICE = ("--emulate", TRUTH, "--dilation", str(DILATION), "--max-num-seqs", "48")
LONGEST_S = 400.0


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vllm_disagg", "profile", *arguments]


def works(rng: random.Random, kind: str, *, most_streams: int) -> list[list[tuple[int, int]]]:
    found = []
    for _ in range(60):
        prompts = [(0, rng.randint(16, 500)) for _ in range(rng.randint(1, 3))]
        streams = [(rng.randint(20, 1500), 1) for _ in range(rng.randint(1, most_streams))]
        found.append({"prefill": prompts, "decode": streams, "mixed": streams + prompts}[kind])
    return found


def errors(model: LatencyModel, kind: str, *, most_streams: int = 32) -> tuple[float, float]:
    """Median and ninth decile of the difference from the truth, over steps that nobody has measured."""
    truth = load_profile(TRUTH).entry(1).latency
    off = sorted(
        abs(model.step_s(work_of(work)) / (DILATION * truth.step_s(work_of(work))) - 1)
        for work in works(random.Random(5), kind, most_streams=most_streams)
    )
    return off[len(off) // 2], off[len(off) * 9 // 10]


def tell(out: Path) -> None:
    profile = load_profile(str(out))
    print(judge_profile(profile))
    for kind in ("prefill", "decode", "mixed"):
        found = errors(profile.entry(1).latency, kind)
        print(f"{kind}: off by {found[0]:.1%} (median), {found[1]:.1%} (p90)", profile.entry(1).residuals)


@pytest.mark.full
def test_an_interrupted_measurement_goes_on_to_a_whole_profile(tmp_path: Path) -> None:
    out, journal = tmp_path / "profile.json", tmp_path / "profile.json.partial"
    arguments = command(*DEVICE, "--budget-min", "1.2", "--out", str(out))
    first = subprocess.Popen(
        arguments, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    deadline_s = time.monotonic() + LONGEST_S
    while not (journal.exists() and journal.read_text().count("\n") > 12):
        assert first.poll() is None and time.monotonic() < deadline_s, first.stderr and first.stderr.read()
        time.sleep(0.1)  # bounded polling of another process
    first.send_signal(signal.SIGINT)
    _, told = first.communicate(timeout=60)
    assert first.returncode not in (0, None) and "goes on from" in told and "Traceback" not in told
    cells = journal.read_text().count("\n") - 2

    refused = _done(command("--emulate", "tiny", "--budget-min", "1", "--out", str(out)))
    assert refused.returncode == 2 and "profile.json.partial was begun with" in refused.stderr

    second = _done(arguments)

    assert second.returncode == 0, second.stderr
    assert f"{cells} cells" in second.stderr
    assert "wrote" in second.stdout and not journal.exists()
    profile = load_profile(str(out))
    assert profile.kind == "guess"
    assert profile.model.kv_bytes_per_token == load_profile(TRUTH).model.kv_bytes_per_token
    assert 0.98 < profile.kv_capacity_tokens(1, 1) / load_profile(TRUTH).kv_capacity_tokens(1, 1) <= 1.0
    assert profile.entry(1).measurement["method"] == "steps"
    assert profile.entry(1).latency.prefill and profile.entry(1).latency.decode
    tell(out)


@pytest.mark.full
def test_a_running_engine_is_measured_from_the_outside(host: ForkHost, tmp_path: Path) -> None:
    create_key_file(tmp_path / "key")
    with ExitStack() as stack:
        engine = emulated_engine(
            "engine", host=host, folder=tmp_path, key_file=tmp_path / "key", role=None, profile=TRUTH,
            block_size=16, flags=("--emulate-host", "shown", *DEVICE[2:]),
        )  # fmt: skip
        stack.callback(engine.stop)
        engine.start()
        engine.wait_until_ready()
        out = tmp_path / "profile.json"
        outside = ("--url", engine.url, "--shape", TRUTH, "--device", "a100", "--max-seqs", "48", "--out", str(out))

        unknown = _done(command(*outside, "--budget-min", "1"))
        assert unknown.returncode == 2
        assert unknown.stderr.strip() == "error: --url needs --device-memory-gib: an engine's API does not tell"
        done = _done(command(*outside, "--budget-min", "1.5", "--device-memory-gib", "80"))

    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())["entries"][0]["measurement"]
    assert told["method"] == "streams" and told["between_steps_s"] is None
    tell(out)  # what is seen from outside contains the host's time between steps


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--url", "http://127.0.0.1:9"), "http://127.0.0.1:9/v1/models cannot be read"),
        (("/no/such/model",), "there is no model at /no/such/model"),
        (("model", "--out", "/no/such/folder/p.json"), "there is no folder /no/such/folder"),
        (("--emulate", "nothing"), "no profile 'nothing'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: Sequence[str], said: str) -> None:
    done = _done(command(*arguments))

    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def _done(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=LONGEST_S, check=False)
