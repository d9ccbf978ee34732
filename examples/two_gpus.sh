#!/usr/bin/env bash
# One prefill and one decode engine on the two GPUs of one host, and the proxy on port 8000. Not yet run on a GPU.
# The engines share the key in ~/.config/vllm-disagg, which the first one makes.
set -euo pipefail
model=${1:?usage: two_gpus.sh MODEL}
trap 'kill 0' EXIT

CUDA_VISIBLE_DEVICES=0 vllm serve "$model" --kv-role prefill --port 8100 &
CUDA_VISIBLE_DEVICES=1 vllm serve "$model" --kv-role decode --port 8200 &
vllm-disagg proxy --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200
