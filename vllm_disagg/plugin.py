"""The `vllm.general_plugins` entry point: makes the connector known to vLLM and adds our flags to `vllm serve`.

vLLM calls `register` in every process, possibly twice. Without one of our flags it changes nothing else.
"""

from __future__ import annotations

import functools
import logging
from argparse import ArgumentParser
from typing import Any

logger = logging.getLogger(__name__)

CONNECTOR = "DisaggConnector"
_MARK = "_vllm_disagg"


def register() -> None:
    """Register the connector and wrap `EngineArgs.add_cli_args`. Never raises: without our flags vLLM must start."""
    try:
        _register_connector()
        _wrap_cli()
    except Exception:  # an exception here would end every vLLM process, also those that do not use us
        logger.exception("plugin.failed: --kv-role is not available")


def _register_connector() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "vllm_disagg.connector", CONNECTOR)


def _wrap_cli() -> None:
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.add_cli_args
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def add_cli_args(parser: ArgumentParser) -> Any:
        from vllm_disagg.engine_flags import add_flags

        return add_flags(original(parser))

    setattr(add_cli_args, _MARK, True)
    EngineArgs.add_cli_args = staticmethod(add_cli_args)
