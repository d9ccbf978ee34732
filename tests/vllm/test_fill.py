"""A real engine as the profiler starts it: what it says of itself, its steps, and KV that nobody has computed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.vllm.filled import BLOCK_SIZE, NUM_BLOCKS, NUM_PROMPT
from vllm_disagg.profiler.facts import read_facts
from vllm_disagg.profiler.steps import read_steps

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]


@pytest.mark.full
def test_a_real_engine_says_what_it_is_and_fills_contexts_where_it_is_asked_to(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.vllm.filled", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_CPU_OMP_THREADS_BIND": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]

    steps = read_steps(tmp_path / "steps")
    assert [step.requests for step in steps] == [
        ((0, NUM_PROMPT),), ((NUM_PROMPT, 1),), ((NUM_PROMPT + 1, 1),),
        ((NUM_PROMPT - 1, 1),), ((NUM_PROMPT, 1),), ((NUM_PROMPT + 1, 1),),
    ]  # fmt: skip
    assert all(step.step_s > 0 for step in steps)

    facts = read_facts(tmp_path / "steps")
    assert facts is not None and facts.fills_kv and facts.emulated == "" and facts.tp == 1
    assert (facts.model.num_layers, facts.model.num_heads, facts.model.num_kv_heads) == (3, 8, 4)
    assert (facts.model.head_size, facts.model.hidden_size, facts.model.max_model_len) == (32, 256, 512)
    assert facts.model.kv_bytes_per_token == 2 * 3 * 4 * 32 * 4
    assert facts.kv_capacity_tokens == (NUM_BLOCKS - 1) * BLOCK_SIZE and facts.block_size == BLOCK_SIZE
    assert facts.model.weight_bytes > 4 * 3 * 256 * 512 * 3  # three layers' feed-forward matrices in float32
    assert facts.device.endswith("1 core") and facts.device_memory_bytes > 2**30
    assert facts.max_seqs == 8 and facts.dtype == "float32"
