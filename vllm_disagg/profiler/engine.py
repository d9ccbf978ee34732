"""The engine that is measured: one of our own, started for it and ended afterwards, or one that runs already."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from vllm_disagg.core.profile import ModelShape
from vllm_disagg.core.steps import RecordedStep, parse_steps
from vllm_disagg.errors import ConfigError
from vllm_disagg.folders import user_folder
from vllm_disagg.launcher.child import Child, until_ready
from vllm_disagg.launcher.console import Console
from vllm_disagg.launcher.machine import Machine, free_ports, this_machine
from vllm_disagg.launcher.plan import ENGINE_COMMAND, cpu_defaults, cpu_places, given, kv_cache_bytes
from vllm_disagg.launcher.settings import has_flag
from vllm_disagg.launcher.up import check_model, weights_bytes
from vllm_disagg.profiler.facts import EngineFacts, read_facts
from vllm_disagg.profiler.settings import ProfileSettings
from vllm_disagg.profiler.steps import STEPS_ENV
from vllm_disagg.profiles import load_profile
from vllm_disagg.profiles.shapes import SHAPES

_HTTP_TIMEOUT = aiohttp.ClientTimeout(total=10.0)
_GRACE_S: Final = 15.0
_DTYPE_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}


class StepTail:
    """What an engine appends to its log of steps from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = path.stat().st_size if path.exists() else 0

    def new(self) -> list[RecordedStep]:
        """Since the last call; a line that is still being written comes with the next one.

        Raises:
            ConfigError: the file is gone, or not a log of steps.
        """
        try:
            with self._path.open("rb") as log:
                log.seek(self._at)
                content = log.read()
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be read: {error.strerror}") from error
        whole = content[: content.rfind(b"\n") + 1]
        self._at += len(whole)
        return parse_steps(whole.decode("utf-8", "replace"), origin=str(self._path))


@dataclass(frozen=True, kw_only=True)
class Target:
    """An engine that is ready to be measured.

    Attributes:
        url, served_name: where it answers, and to which name.
        facts: what it is.
        tail: its log of steps; None where steps have to be told from when tokens come.
        is_ours: it was started for this.
    """

    url: str
    served_name: str
    facts: EngineFacts
    tail: StepTail | None
    is_ours: bool


@contextlib.asynccontextmanager
async def engine_to_measure(settings: ProfileSettings, console: Console) -> AsyncIterator[Target]:
    """An engine for as long as it is measured. One of our own is ended afterwards, whatever happens.

    Raises:
        ConfigError: it cannot be one that was asked for, or does not say what it is.
        LaunchError: one of our own did not start.
    """
    async with aiohttp.ClientSession(timeout=_HTTP_TIMEOUT, trust_env=False) as http:
        if settings.url is not None:
            yield await _running(settings, settings.url, http)
            return
        with tempfile.TemporaryDirectory(prefix="vllm-disagg-profile-") as folder:
            child, url, log = _child(settings, Path(folder), console)
            try:
                await child.start()
                console.line(f"starting {' '.join(settings.engine) or settings.emulate}; log: {child.log_file}")

                async def healthy() -> bool:
                    console.status("the engine is loading ...")
                    async with http.get(f"{url}/health") as answer:
                        return answer.status == 200

                await until_ready(child, healthy, timeout_s=settings.start_timeout_s)
                facts = read_facts(log)
                if facts is None:
                    raise ConfigError(
                        f"the engine has not said what it is; see `recorder.no_facts` in {child.log_file}"
                    )
                served, _, _ = await _served(url, http)
                yield Target(url=url, served_name=served, facts=facts, tail=StepTail(log), is_ours=True)
            finally:
                await child.stop()


def _child(settings: ProfileSettings, folder: Path, console: Console) -> tuple[Child, str, Path]:
    """The process of an engine of our own, its URL and its log of steps."""
    port, log = free_ports(1)[0], folder / "steps.jsonl"
    url = f"http://127.0.0.1:{port}"
    executor = "vllm_disagg.profiler.recorder.RecordingExecutor"
    argv = [*ENGINE_COMMAND, *settings.engine, "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--no-async-scheduling", "--no-enable-prefix-caching"]
    env: dict[str, str] = {STEPS_ENV: str(log), "PYTHONFAULTHANDLER": "1"}
    cpus: tuple[int, ...] = ()
    if settings.emulate is not None:
        load_profile(settings.emulate, model=_model_in_file(settings))  # found wanting now, rather than in the engine
        executor = "vllm_disagg.profiler.emulated.RecordingEmulatedExecutor"
        argv += ["--emulate", settings.emulate]
        if not has_flag(settings.engine, "--emulate-host"):
            argv += ["--emulate-host", "shown"]  # else a step is the shorter by what the host took before it
    else:
        local = check_model(settings.engine[0])
        machine = this_machine()
        filling = {
            "kv_connector": "FillOnDemand",
            "kv_connector_module_path": "vllm_disagg.profiler.fill",
            "kv_role": "kv_both",
        }
        argv += ["--kv-transfer-config", json.dumps(filling)]
        if not machine.gpus:
            flags, more, cpus = _on_cpu(settings, machine, weights_bytes(local), console)
            argv += flags
            env |= more
    argv += ["--distributed-executor-backend", executor]
    log_file = user_folder("state") / f"profile-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    return Child("engine", argv, env=env, log_file=log_file, grace_s=_GRACE_S, cpus=cpus), url, log


def _model_in_file(settings: ProfileSettings) -> str | None:
    """Which model of a file with several."""
    name = settings.engine[0] if settings.engine else None
    return name if name in SHAPES else None


def _on_cpu(
    settings: ProfileSettings, machine: Machine, weights: int, console: Console
) -> tuple[list[str], dict[str, str], tuple[int, ...]]:
    """Flags, environment and cores of an engine on the CPU: as `vllm-disagg up` would start it on that many cores."""
    arguments, tp = settings.engine[1:], tensor_parallel_of(settings.engine)
    if settings.cores is not None:
        if settings.cores > len(machine.cores):
            raise ConfigError(f"--cores {settings.cores}: this process may use {len(machine.cores)}")
        machine = dataclasses.replace(machine, cores=machine.cores[: settings.cores])
    kv_bytes = kv_cache_bytes(machine, num_engines=1, tp=tp, weights_bytes=weights)
    defaults, _ = cpu_defaults(arguments, kv_bytes, os.environ)
    flags = [part for flag in defaults if not given(arguments, flag[0]) for part in flag]
    if os.environ.get("VLLM_CPU_OMP_THREADS_BIND"):
        return flags, {}, ()
    place, env, cpus = cpu_places(1, tp, machine)[0]
    console.line(f"the engine gets {place}")
    return flags, env, cpus if settings.cores is not None else ()


def tensor_parallel_of(arguments: tuple[str, ...]) -> int:
    """The tensor-parallel degree among engine flags, 1 without one."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.replace("_", "-").partition("=")
        if name in ("--tensor-parallel-size", "-tp"):
            text = value if equals else arguments[index + 1] if index + 1 < len(arguments) else ""
            if not text.isdecimal() or int(text) < 1:
                raise ConfigError(f"{name} must be a whole number from 1 on, not {text!r}")
            return int(text)
    return 1


async def _running(settings: ProfileSettings, url: str, http: aiohttp.ClientSession) -> Target:
    served, root, longest = await _served(url, http)
    tail = facts = None
    if settings.steps is not None:
        tail, facts = _log_of_running(Path(settings.steps))
    if facts is None:
        facts = await _facts_from_outside(settings, url, root, longest, http)
    return Target(url=url, served_name=served, facts=facts, tail=tail, is_ours=False)


def _log_of_running(log: Path) -> tuple[StepTail, EngineFacts | None]:
    if not log.is_file():
        raise ConfigError(f"--steps {log}: no such file; start the engine with --kv-step-log {log}")
    return StepTail(log), read_facts(log)


async def _served(url: str, http: aiohttp.ClientSession) -> tuple[str, str, int]:
    """Name, origin and longest context of what is served there."""
    document = await _json(f"{url}/v1/models", http)
    try:
        model = document["data"][0]
        return str(model["id"]), str(model.get("root") or model["id"]), int(model["max_model_len"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(f"{url}/v1/models is not vLLM's: give the URL of an engine's API, not a proxy's") from error


async def _facts_from_outside(
    settings: ProfileSettings, url: str, root: str, longest: int, http: aiohttp.ClientSession
) -> EngineFacts:
    for name in ("device", "device_memory_gib"):
        if getattr(settings, name) is None:
            raise ConfigError(f"--url needs --{name.replace('_', '-')}: an engine's API does not tell")
    assert settings.device is not None and settings.device_memory_gib is not None
    cache = await _cache_config(url, http)
    try:
        block_size, num_blocks = int(cache["block_size"]), int(cache["num_gpu_blocks"])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{url}/metrics does not say how large the KV cache is") from error
    if settings.shape is not None:
        shape = load_profile(settings.shape).model
    else:
        shape = shape_of_folder(_model_folder(root), cache_dtype=cache.get("cache_dtype", "auto"))
    version = await _json(f"{url}/version", http)
    return EngineFacts(
        model=dataclasses.replace(shape, max_model_len=longest),
        device=settings.device,
        device_memory_bytes=int(settings.device_memory_gib * 2**30),
        tp=1,
        kv_capacity_tokens=(num_blocks - 1) * block_size,
        block_size=block_size,
        step_tokens=settings.step_tokens,
        max_seqs=settings.max_seqs,
        versions={"vllm": str(version.get("version", "unknown"))} if isinstance(version, Mapping) else {},
    )


def shape_of_folder(folder: Path, *, cache_dtype: str) -> ModelShape:
    """A model's shape from its configuration in Hugging Face's form.

    Args:
        folder: of the model.
        cache_dtype: of the KV cache, as vLLM names it; `auto` for the model's own.

    Raises:
        ConfigError: the configuration lacks something.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        layers, kv_heads = int(config["num_hidden_layers"]), int(config.get("num_key_value_heads") or heads)
        head_size = int(config.get("head_dim") or hidden // heads)
        own_dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        dtype = own_dtype if cache_dtype == "auto" else cache_dtype
        return ModelShape(
            name=folder.name,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            hidden_size=hidden,
            weight_bytes=max(1, weights_bytes(folder)),
            kv_bytes_per_token=2 * layers * kv_heads * head_size * _DTYPE_BYTES[dtype],
            max_model_len=int(config.get("max_position_embeddings") or 2048),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} does not say what the KV cache depends on ({error!r}): give a profile of this model with --shape"
        ) from error


def _model_folder(root: str) -> Path:
    """Where a model's files are on this machine."""
    if (Path(root) / "config.json").is_file():
        return Path(root)
    with contextlib.suppress(ImportError, ValueError, OSError):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(root, "config.json")
        if isinstance(found, str):
            return Path(found).parent
    raise ConfigError(f"the config.json of {root} is not on this machine: give a profile of this model with --shape")


async def _json(url: str, http: aiohttp.ClientSession) -> Any:
    try:
        async with http.get(url) as answer:
            if answer.status != 200:
                raise ConfigError(f"{url} answers {answer.status}: give the URL of a vLLM API server")
            return await answer.json(content_type=None)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise ConfigError(f"{url} cannot be read: {str(error) or type(error).__name__}") from error


async def _cache_config(url: str, http: aiohttp.ClientSession) -> dict[str, str]:
    """Labels of vLLM's metric about its KV cache."""
    try:
        async with http.get(f"{url}/metrics") as answer:
            text = await answer.text()
        wanted = "\n".join(line for line in text.splitlines() if re.match(r"vllm:cache_config_info\b", line))
        for family in text_string_to_metric_families(wanted + "\n"):
            for sample in family.samples:
                return dict(sample.labels)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        raise ConfigError(f"{url}/metrics cannot be read: {str(error) or type(error).__name__}") from error
    raise ConfigError(f"{url}/metrics has none of vLLM's metrics of its KV cache: is it a vLLM API server?")
