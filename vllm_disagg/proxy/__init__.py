"""The proxy: one OpenAI interface in front of prefill and decode instances."""

from vllm_disagg.proxy.app import create_app
from vllm_disagg.proxy.server import run

__all__ = ["create_app", "run"]
