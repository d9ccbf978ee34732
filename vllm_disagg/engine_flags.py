"""The flags of an engine's role: `vllm serve MODEL --kv-role prefill|decode` and the few that go with it.

They become ordinary vLLM fields (`kv_transfer_config`, `scheduler_cls`, `middleware`) as soon as the command line has
been read, so nothing of ours has to survive in the namespace that vLLM hands to its processes.
"""

from __future__ import annotations

import argparse
import functools
import os
import socket
from argparse import ArgumentParser, Namespace
from typing import Any, get_args

from vllm_disagg.config import (
    ROLES,
    EngineSettings,
    PrefillOrder,
    Scheduling,
    VerifyMode,
    default_of,
    help_of,
)
from vllm_disagg.connector.support import UNSUPPORTED_EXECUTORS
from vllm_disagg.core.keys import load_key
from vllm_disagg.emulation import flags as emulation
from vllm_disagg.errors import ConfigError, VllmUnavailable
from vllm_disagg.seams import check_version

GROUP = "VllmDisagg"
FRONTEND = "vllm_disagg.frontend.DisaggFrontend"
_ROLE_HELP = (
    "Make this instance one half of a split deployment: `prefill` computes prompts and keeps their KV for a decode "
    "instance, `decode` fetches KV and generates. Put `vllm-disagg proxy` in front of both."
)
_FLAGS: dict[str, tuple[str, type | tuple[str, ...]]] = {
    "transport": ("--kv-transport", ("auto", "nixl", "nccl")),  # `loopback` stays inside one process: for tests
    "control_host": ("--kv-control-host", str),
    "control_port": ("--kv-control-port", int),
    "lease_s": ("--kv-lease-s", float),
    "pull_timeout_s": ("--kv-pull-timeout-s", float),
    "early_reads": ("--kv-early-reads", bool),
    "verify": ("--kv-verify", get_args(VerifyMode)),
    "back_pressure": ("--kv-back-pressure", bool),
    "scheduling": ("--kv-scheduling", get_args(Scheduling)),
    "prefill_order": ("--kv-prefill-order", get_args(PrefillOrder)),
    "batch_tokens": ("--kv-batch-tokens", int),
    "held_share": ("--kv-held-share", float),
    "patience_s": ("--kv-patience-s", float),
    "slo_ttft_s": ("--kv-slo-ttft-s", float),
    "slo_tpot_s": ("--kv-slo-tpot-s", float),
    "profile": ("--kv-profile", str),
    "step_log": ("--kv-step-log", str),
    "key_file": ("--kv-key-file", str),
}
_CONFLICTS: dict[str, str] = {
    "kv_transfer_config": "--kv-transfer-config",
    "kv_offloading_size": "--kv-offloading-size",
    "scheduler_cls": "--scheduler-cls",
    "grpc": "--grpc",
    "enable_sleep_mode": "--enable-sleep-mode",
    "enable_return_routed_experts": "--enable-return-routed-experts",
}
"""Fields that mean something else than `--kv-role` does, and their flags."""


def add_flags(parser: ArgumentParser) -> ArgumentParser:
    """Add our group to a parser that has vLLM's engine arguments, and read it back after each parse."""
    if "--kv-role" in parser._option_string_actions:  # vLLM has got one of its own, or this parser was here before
        return parser
    group = parser.add_argument_group(title=GROUP, description="Prefill/decode disaggregation.")
    group.add_argument("--kv-role", choices=list(ROLES), default=argparse.SUPPRESS, help=_ROLE_HELP)
    for name, (flag, kind) in _FLAGS.items():
        default = default_of(EngineSettings, name)
        text = help_of(EngineSettings, name) + ("" if default is None else f" (default: {default})")
        if isinstance(kind, tuple):
            group.add_argument(flag, choices=list(kind), default=argparse.SUPPRESS, help=text)
        elif kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            group.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=text)
    emulation.add_flags(parser)
    _finish_after_parse(parser)
    return parser


def apply(namespace: Namespace) -> None:
    """Turn our flags into vLLM's fields, and remove them.

    Raises:
        ConfigError: a flag contradicts another, or something `--kv-role` needs is not there.
        VllmUnavailable: this vLLM is unknown.
    """
    given = {
        name: namespace.__dict__.pop(_dest(flag)) for name, (flag, _) in _FLAGS.items() if _dest(flag) in namespace
    }
    role = namespace.__dict__.pop("kv_role", None)
    if role is None:
        if given:
            raise ConfigError(f"{_FLAGS[next(iter(given))][0]} needs --kv-role prefill or --kv-role decode")
        return
    settings = EngineSettings(role=role, **given)
    check_version()
    _refuse_conflicts(namespace)
    load_key(settings.key_file)  # made or found wanting now, rather than in a child process
    if role == "prefill":
        _check_port_is_free(settings)
    _write(namespace, settings)


def _finish_after_parse(parser: ArgumentParser) -> None:
    original = parser.parse_known_args

    @functools.wraps(original)
    def parse_known_args(*args: Any, **kwargs: Any) -> Any:
        namespace, extras = original(*args, **kwargs)
        try:
            emulation.apply(namespace)
            apply(namespace)
        except (ConfigError, VllmUnavailable) as error:
            parser.error(str(error))
        return namespace, extras

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def _refuse_conflicts(namespace: Namespace) -> None:
    for field, flag in _CONFLICTS.items():
        if getattr(namespace, field, None):
            raise ConfigError(f"--kv-role and {flag} exclude each other: give one of the two")
    if getattr(namespace, "data_parallel_size", 1) not in (None, 1):
        raise ConfigError("--kv-role does not support --data-parallel-size above 1: start one instance per replica")
    executor = getattr(namespace, "distributed_executor_backend", None)
    if executor in UNSUPPORTED_EXECUTORS:
        raise ConfigError(
            f"--kv-role does not support --distributed-executor-backend {executor}: use mp, with all ranks on one host"
        )
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise ConfigError("--kv-role does not support VLLM_USE_RUST_FRONTEND: unset it")
    if os.environ.get("VLLM_ALLOW_INSECURE_SERIALIZATION", "0") not in ("", "0"):
        raise ConfigError("--kv-role refuses VLLM_ALLOW_INSECURE_SERIALIZATION: unset it")


def _check_port_is_free(settings: EngineSettings) -> None:
    family = socket.AF_INET6 if ":" in settings.control_host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.control_host, settings.control_port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {settings.control_host}:{settings.control_port} for decode instances "
                f"({error.strerror}): choose a free --kv-control-port, or another --kv-control-host"
            ) from error


def _write(namespace: Namespace, settings: EngineSettings) -> None:
    from vllm.config import KVTransferConfig

    from vllm_disagg.plugin import CONNECTOR

    namespace.kv_transfer_config = KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_role="kv_producer" if settings.role == "prefill" else "kv_consumer",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=settings.to_extra_config(),
    )
    namespace.scheduler_cls = f"vllm_disagg.scheduler.{settings.role}_scheduler"
    if hasattr(namespace, "middleware"):
        namespace.middleware = [*(namespace.middleware or []), FRONTEND]


def _dest(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")
