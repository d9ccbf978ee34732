"""A recording engine with a tiny Llama on CPU, which computes one prompt and takes another one's KV as given.

    python -m tests.vllm.filled FOLDER

A process of its own, since vLLM's CPU worker binds its process's threads to cores. Its steps and what it says it is are
in the folder afterwards.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

BLOCK_SIZE, NUM_BLOCKS, NUM_PROMPT = 32, 64, 100
CONNECTOR = {
    "kv_connector": "FillOnDemand", "kv_connector_module_path": "vllm_disagg.profiler.fill", "kv_role": "kv_both",
}  # fmt: skip


def main(folder: Path) -> None:
    """Serve both requests, the one after the other."""
    os.environ["VLLM_DISAGG_STEPS"] = str(folder / "steps")

    from vllm.sampling_params import SamplingParams

    from tests.vllm.emulated import Engine
    from vllm_disagg.demo.model import tiny_llama_path
    from vllm_disagg.profiler.drive import FILL_PARAMS

    engine = Engine(
        [
            "--model", str(tiny_llama_path()), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512",
            "--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(NUM_BLOCKS), "--max-num-seqs", "8",
            "--kv-cache-memory-bytes", "50000000", "--no-enable-prefix-caching", "--no-async-scheduling",
            "--kv-transfer-config", json.dumps(CONNECTOR),
            "--distributed-executor-backend", "vllm_disagg.profiler.recorder.RecordingExecutor",
        ]
    )  # fmt: skip
    wish = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    engine.run([engine.add(range(5, 5 + NUM_PROMPT), wish)])
    engine.run([engine.add(range(5, 5 + NUM_PROMPT), wish, kv_params=dict(FILL_PARAMS))])
    engine.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
