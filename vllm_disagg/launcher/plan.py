"""Which process runs where: a pure function from what the user asks and what the machine has to a frozen plan."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_disagg.config import EngineSettings, ProxySettings, Role, default_of
from vllm_disagg.errors import ConfigError
from vllm_disagg.launcher.fork_host import SINGLE_THREADED
from vllm_disagg.launcher.machine import Machine
from vllm_disagg.launcher.settings import UpSettings, has_flag

ENGINE_HOST = "127.0.0.1"
ENGINE_COMMAND: tuple[str, ...] = (sys.executable, "-m", "vllm_disagg", "serve")
FORKED_ENGINE_COMMAND: tuple[str, ...] = (
    sys.executable, "-I", "-S", str(Path(__file__).with_name("forked_engine.py")),
)  # fmt: skip
FORK_HOST_COMMAND: tuple[str, ...] = (sys.executable, "-m", "vllm_disagg.launcher.fork_host")
PROXY_COMMAND: tuple[str, ...] = (sys.executable, "-m", "vllm_disagg", "proxy")

CPU_BLOCK_SIZE = 32
"""Tokens per KV block on CPU: the smallest that its kernels like, so that short prompts are split too."""

_KV_SHARE = 0.4
"""Part of an instance's free memory, less the weights, that becomes KV cache on CPU. The rest holds activations and
the up to three processes of an engine."""

_KV_MIN_BYTES, _KV_MAX_BYTES = 256 << 20, 8 << 30
_SPARE_CORE_FROM = 4
"""A rank with this many cores leaves one to the engine's other processes, which would otherwise stall its threads."""

_QUIET_FLAG = "--disable-access-log-for-endpoints"
_QUIET_PATHS = "/health,/metrics,/disagg/status"
"""Asked every second by the proxy; they would fill the engines' logs."""

_SAME_DECISION: dict[str, tuple[str, ...]] = {
    "--enforce-eager": ("--no-enforce-eager", "--compilation-config", "-cc", "--optimization-level", "-O"),
    "--kv-cache-memory-bytes": ("--gpu-memory-utilization",),
}
_ENGINE_ENV = {"PYTHONFAULTHANDLER": "1"}
"""A crash in native code leaves a stack in the log instead of nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLaunch:
    """One engine: its command, what is added to its environment, and where it will answer.

    `cpus` are the logical CPUs all its processes stay on, none for any. vLLM binds its workers' threads only; its
    scheduler process spins while a step runs, and left alone it does so on the other engines' cores.
    """

    name: str
    role: Role
    port: int
    place: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    cpus: tuple[int, ...] = ()

    @property
    def url(self) -> str:
        """Where the engine's API will be."""
        return f"http://{ENGINE_HOST}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkHostLaunch:
    """The process that emulated engines are forked from, and the socket it makes when it is ready."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    socket: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchPlan:
    """All that `up` is going to start.

    Attributes:
        engines: prefill instances first.
        proxy_argv: the proxy's command.
        proxy_url: where a client on this machine reaches it.
        notes: choices made for the user, each one line to print.
        warnings: what the user may want to change, each one line to print.
        fork_host: started before the engines, which need it; None for engines that are processes of their own.
    """

    engines: tuple[EngineLaunch, ...]
    proxy_argv: tuple[str, ...]
    proxy_url: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    fork_host: ForkHostLaunch | None = None


def ports_needed(settings: UpSettings) -> int:
    """How many free ports `plan_launch` wants: one per engine, and a control port per prefill instance."""
    return 2 * settings.prefill + settings.decode


def plan_launch(
    settings: UpSettings,
    machine: Machine,
    *,
    ports: Sequence[int],
    key_file: str,
    folder: str = "",
    weights_bytes: int = 0,
    environ: Mapping[str, str] | None = None,
    engine_command: Sequence[str] = ENGINE_COMMAND,
    proxy_command: Sequence[str] = PROXY_COMMAND,
) -> LaunchPlan:
    """Place every engine and write every command line.

    Args:
        settings: what the user asks for.
        machine: what there is.
        ports: at least `ports_needed(settings)` free ports of loopback.
        key_file: the deployment key of this run.
        folder: private to this run, for sockets and the like.
        weights_bytes: size of the model's weights; 0 where it is not known yet.
        environ: the user's environment, whose vLLM settings are respected.
        engine_command: what stands before the model; tests start something else than vLLM.
        proxy_command: what stands before the proxy's options.

    Raises:
        ConfigError: the machine has fewer GPUs than asked for.
    """
    host = None
    if settings.emulate is not None:
        places: list[Place] = [("emulated", {}, ())] * _num_engines(settings)
        flags, notes = _emulation_flags(settings, folder), _emulation_notes(settings)
        host = _fork_host(folder)
        engine_command = (*FORKED_ENGINE_COMMAND, host.socket)
    elif machine.gpus:
        places, flags, notes = _gpu_places(settings, machine), (), ()
    else:
        places = cpu_places(_num_engines(settings), settings.tp, machine)
        kv_bytes = _kv_cache_bytes(settings, machine, weights_bytes)
        flags, notes = cpu_defaults(settings.engine_arg, kv_bytes, environ or {})
    defaults = ((_QUIET_FLAG, _QUIET_PATHS), *flags)
    remaining = iter(ports)
    engines: list[EngineLaunch] = []
    for name, role in _instances(settings):
        place, env, cpus = places[len(engines)]
        port = next(remaining)
        control = ("--kv-control-port", str(next(remaining))) if role == "prefill" else ()
        argv = (
            *engine_command, settings.model or "", "--host", ENGINE_HOST, "--port", str(port),
            "--kv-role", role, "--kv-key-file", key_file, *control,
            *_tp_flag(settings), *_unless_given(defaults, settings, role), *_user_arguments(settings, role),
        )  # fmt: skip
        engines.append(
            EngineLaunch(name=name, role=role, port=port, place=place, argv=argv, env={**_ENGINE_ENV, **env}, cpus=cpus)
        )
    proxy_argv = (*proxy_command, "--host", settings.host, "--port", str(settings.port), *_proxy_timeouts(settings))
    return LaunchPlan(
        engines=tuple(engines),
        proxy_argv=(*proxy_argv, *_instance_flags(engines)),
        proxy_url=f"http://{_reachable(settings.host)}:{settings.port}",
        notes=notes,
        warnings=_warnings(settings, machine),
        fork_host=host,
    )


def _fork_host(folder: str) -> ForkHostLaunch:
    socket = str(Path(folder) / "fork-host.sock")
    return ForkHostLaunch(argv=(*FORK_HOST_COMMAND, socket), env=SINGLE_THREADED, socket=socket)


def _emulation_flags(settings: UpSettings, folder: str) -> tuple[tuple[str, ...], ...]:
    """The emulation itself, and the deadlines of KV transfers in the devices' own, dilated time."""
    assert settings.emulate is not None
    deadlines = [
        (f"--kv-{name.replace('_', '-')}", str(default_of(EngineSettings, name) * settings.dilation))
        for name in ("lease_s", "pull_timeout_s")
    ]
    return (
        ("--emulate", settings.emulate),
        ("--dilation", str(settings.dilation)),
        ("--emulate-link", settings.emulate_link),
        ("--emulate-link-ledger", str(Path(folder) / "links")),
        *(deadlines if settings.dilation > 1 else ()),
    )


def _proxy_timeouts(settings: UpSettings) -> tuple[str, ...]:
    """The proxy's patience with dilated engines."""
    if settings.emulate is None or settings.dilation <= 1:
        return ()
    names = ("prefill_timeout_s", "first_event_timeout_s", "idle_timeout_s")
    return tuple(
        part
        for name in names
        for part in (f"--{name.replace('_', '-')}", str(default_of(ProxySettings, name) * settings.dilation))
    )


def _emulation_notes(settings: UpSettings) -> tuple[str, ...]:
    slower = f", {settings.dilation:g} times slower: divide times by that" if settings.dilation != 1 else ""
    return (f"emulated devices after the profile {settings.emulate}{slower}; answers mean nothing",)


Place = tuple[str, dict[str, str], tuple[int, ...]]
"""How an engine's place is shown, what tells vLLM of it, and the CPUs its processes stay on."""


def _instances(settings: UpSettings) -> list[tuple[str, Role]]:
    prefill: list[tuple[str, Role]] = [(f"prefill-{index}", "prefill") for index in range(settings.prefill)]
    return prefill + [(f"decode-{index}", "decode") for index in range(settings.decode)]


def _num_engines(settings: UpSettings) -> int:
    return settings.prefill + settings.decode


def _gpu_places(settings: UpSettings, machine: Machine) -> list[Place]:
    """Consecutive GPUs for each engine. Not yet run on a GPU."""
    needed = _num_engines(settings) * settings.tp
    if needed > len(machine.gpus):
        raise ConfigError(
            f"{settings.prefill} prefill and {settings.decode} decode instances with --tp {settings.tp} need {needed} "
            f"GPUs, and {len(machine.gpus)} are visible: lower --prefill, --decode or --tp"
        )
    places: list[Place] = []
    for index in range(_num_engines(settings)):
        mine = ",".join(machine.gpus[index * settings.tp : (index + 1) * settings.tp])
        places.append((f"GPU {mine}", {"CUDA_VISIBLE_DEVICES": mine}, ()))
    return places


def cpu_places(num_engines: int, tp: int, machine: Machine) -> list[Place]:
    """A core set for each rank of each engine; whole physical cores while there are enough, shared when too few."""
    num_ranks = num_engines * tp
    cpus = _cpus_for(num_ranks, machine)
    each = len(cpus) // num_ranks
    if each == 0:
        ranks = shares = [[cpus[index % len(cpus)]] for index in range(num_ranks)]
    else:
        shares = [cpus[index * each : (index + 1) * each] for index in range(num_ranks)]
        used = each - 1 if each >= _SPARE_CORE_FROM else each
        ranks = [cpus[index * each : index * each + used] for index in range(num_ranks)]
    places: list[Place] = []
    for index in range(num_engines):
        mine = ranks[index * tp : (index + 1) * tp]
        binding = "|".join(",".join(map(str, rank)) for rank in mine)
        share = shares[index * tp : (index + 1) * tp]
        stay_on = _with_siblings({cpu for rank in share for cpu in rank}, machine, num_ranks)
        places.append((f"cores {binding}", {"VLLM_CPU_OMP_THREADS_BIND": binding}, tuple(sorted(stay_on))))
    return places


def _with_siblings(cpus: set[int], machine: Machine, num_ranks: int) -> set[int]:
    """The same with the other logical CPUs of their physical cores, unless these are another rank's."""
    if len(machine.cores) < num_ranks:
        return cpus
    return {sibling for core in machine.cores if cpus & set(core) for sibling in core}


def _cpus_for(num_ranks: int, machine: Machine) -> list[int]:
    """One logical CPU per physical core, as vLLM itself does, or all of them when that is not enough."""
    if len(machine.cores) >= num_ranks:
        return [core[0] for core in machine.cores]
    return [cpu for core in machine.cores for cpu in core]


def _warnings(settings: UpSettings, machine: Machine) -> tuple[str, ...]:
    num_ranks, num_cpus = _num_engines(settings) * settings.tp, sum(map(len, machine.cores))
    if settings.emulate is not None or machine.gpus or num_ranks <= num_cpus:
        return ()
    return (f"{num_ranks} engine ranks share {num_cpus} cores: expect each to be slower than alone",)


def cpu_defaults(
    arguments: tuple[str, ...], kv_bytes: int, environ: Mapping[str, str]
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Flags that make a CPU engine start quickly and leave memory to the others, and the lines that say so.

    Args:
        arguments: the user's own for every engine; what these decide is not mentioned.
        kv_bytes: size of each rank's KV cache.
        environ: the user's environment.
    """
    chosen = {
        ("--block-size", str(CPU_BLOCK_SIZE)): "short prompts fill blocks, too",
        ("--enforce-eager",): "a quick start; without it vLLM compiles the model",
        ("--kv-cache-memory-bytes", str(kv_bytes)): f"{kv_bytes / 2**30:.1f} GiB per rank",
    }
    if environ.get("VLLM_CPU_KVCACHE_SPACE"):
        del chosen["--kv-cache-memory-bytes", str(kv_bytes)]
    told = [f"{' '.join(flag)} ({why})" for flag, why in chosen.items() if not given(arguments, flag[0])]
    if not told:
        return tuple(chosen), ()
    return tuple(chosen), (f"chosen for CPU engines: {', '.join(told)}; give your own with --engine-arg",)


def _kv_cache_bytes(settings: UpSettings, machine: Machine, weights_bytes: int) -> int:
    return kv_cache_bytes(machine, num_engines=_num_engines(settings), tp=settings.tp, weights_bytes=weights_bytes)


def kv_cache_bytes(machine: Machine, *, num_engines: int, tp: int, weights_bytes: int) -> int:
    """KV cache of each rank of a CPU engine that shares this machine's memory with others like it."""
    share = machine.memory_bytes / (num_engines * tp)
    kv_bytes = int(_KV_SHARE * (share - weights_bytes / tp))
    return min(_KV_MAX_BYTES, max(_KV_MIN_BYTES, kv_bytes)) >> 20 << 20


def _unless_given(defaults: Sequence[tuple[str, ...]], settings: UpSettings, role: Role) -> tuple[str, ...]:
    arguments = _user_arguments(settings, role)
    return tuple(part for flag in defaults if not given(arguments, flag[0]) for part in flag)


def given(arguments: tuple[str, ...], flag: str) -> bool:
    """Whether the user has decided what this flag decides, with the flag itself or another."""
    return any(has_flag(arguments, name) for name in (flag, *_SAME_DECISION.get(flag, ())))


def _user_arguments(settings: UpSettings, role: Role) -> tuple[str, ...]:
    return settings.engine_arg + (settings.prefill_arg if role == "prefill" else settings.decode_arg)


def _tp_flag(settings: UpSettings) -> tuple[str, ...]:
    return ("--tensor-parallel-size", str(settings.tp)) if settings.tp > 1 else ()


def _instance_flags(engines: Sequence[EngineLaunch]) -> list[str]:
    return [part for engine in engines for part in (f"--{engine.role}", engine.url)]


def _reachable(host: str) -> str:
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
