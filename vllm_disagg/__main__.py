"""`python -m vllm_disagg` is `vllm-disagg`."""

from vllm_disagg.cli import main

if __name__ == "__main__":  # vLLM's spawned processes import this module again under another name
    main()
