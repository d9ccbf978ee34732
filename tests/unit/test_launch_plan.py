"""Which process runs where, with which flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_disagg.errors import ConfigError
from vllm_disagg.launcher.machine import Machine, free_ports
from vllm_disagg.launcher.plan import EngineLaunch, LaunchPlan, plan_launch, ports_needed
from vllm_disagg.launcher.settings import UpSettings, has_flag
from vllm_disagg.launcher.up import check_model

GIB = 2**30


def make_machine(*, gpus: int = 0, cores: int = 2, threads: int = 1, memory_bytes: int = 16 * GIB) -> Machine:
    return Machine(
        gpus=tuple(map(str, range(gpus))),
        cores=tuple(tuple(core + thread * cores for thread in range(threads)) for core in range(cores)),
        memory_bytes=memory_bytes,
    )


def plan(settings: UpSettings | None = None, machine: Machine | None = None, **more: Any) -> LaunchPlan:
    settings = settings or UpSettings(model="org/model")
    return plan_launch(
        settings,
        machine or make_machine(),
        ports=range(9000, 9000 + ports_needed(settings)),
        key_file="/run/key",
        engine_command=("serve",),
        proxy_command=("proxy",),
        **more,
    )


def option(engine: EngineLaunch, flag: str) -> str | None:
    return engine.argv[engine.argv.index(flag) + 1] if flag in engine.argv else None


def bindings(launch: LaunchPlan) -> list[str]:
    return [engine.env["VLLM_CPU_OMP_THREADS_BIND"] for engine in launch.engines]


def test_1p1d_on_two_cores() -> None:
    prefill, decode = plan().engines

    assert (prefill.name, decode.name) == ("prefill-0", "decode-0")
    assert prefill.argv[:2] == ("serve", "org/model")
    assert bindings(plan()) == ["0", "1"]
    assert option(prefill, "--kv-role") == "prefill"
    assert option(decode, "--kv-role") == "decode"
    assert option(prefill, "--kv-key-file") == option(decode, "--kv-key-file") == "/run/key"
    assert option(decode, "--kv-control-port") is None


def test_emulated_engines_are_forked_and_take_no_cores() -> None:
    settings = UpSettings(model="tiny", prefill=2, decode=2, emulate="tiny", dilation=3.0, emulate_link="25g")
    launch = plan(settings, make_machine(cores=1), folder="/run/private")

    assert launch.fork_host is not None and launch.fork_host.argv[-1] == launch.fork_host.socket
    assert launch.fork_host.env["OMP_NUM_THREADS"] == "1"
    assert launch.warnings == ()
    assert "3 times slower" in launch.notes[0]
    for engine in launch.engines:
        assert engine.argv[4:6] == (launch.fork_host.socket, "tiny")
        assert (engine.cpus, "VLLM_CPU_OMP_THREADS_BIND" in engine.env) == ((), False)
        assert option(engine, "--dilation") == "3.0"
        assert option(engine, "--emulate-link") == "25g"
        assert option(engine, "--emulate-link-ledger") == "/run/private/links"
        assert option(engine, "--kv-lease-s") == "90.0"
        assert option(engine, "--kv-pull-timeout-s") == "30.0"
    assert launch.proxy_argv[launch.proxy_argv.index("--prefill-timeout-s") + 1] == "360.0"


def test_a_users_own_deadline_is_not_dilated() -> None:
    settings = UpSettings(model="tiny", emulate="tiny", dilation=3.0, engine_arg=("--kv-lease-s=7",))

    assert [option(engine, "--kv-lease-s") for engine in plan(settings).engines] == [None, None]


def test_engines_that_compute_need_no_fork_host() -> None:
    assert plan().fork_host is None


def test_every_port_is_used_once() -> None:
    settings = UpSettings(model="m", prefill=2, decode=3)
    launch = plan(settings, make_machine(cores=8))

    used = [option(engine, flag) for engine in launch.engines for flag in ("--port", "--kv-control-port")]
    assert sorted(int(port) for port in used if port) == list(range(9000, 9000 + ports_needed(settings)))


def test_the_proxy_knows_every_engine() -> None:
    launch = plan(UpSettings(model="m", prefill=1, decode=2, port=8123), make_machine(cores=4))

    assert launch.proxy_argv == (
        *("proxy", "--host", "127.0.0.1", "--port", "8123"),
        *(
            "--prefill",
            "http://127.0.0.1:9000",
            "--decode",
            "http://127.0.0.1:9002",
            "--decode",
            "http://127.0.0.1:9003",
        ),
    )
    assert launch.proxy_url == "http://127.0.0.1:8123"


def test_an_open_address_is_reached_through_loopback() -> None:
    assert plan(UpSettings(model="m", host="0.0.0.0")).proxy_url == "http://127.0.0.1:8000"


def test_each_rank_of_tensor_parallelism_has_cores_of_its_own() -> None:
    launch = plan(UpSettings(model="m", tp=2), make_machine(cores=8))

    assert bindings(launch) == ["0,1|2,3", "4,5|6,7"]
    assert [engine.cpus for engine in launch.engines] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert option(launch.engines[0], "--tensor-parallel-size") == "2"


def test_a_rank_with_many_cores_leaves_one_to_the_engines_other_processes() -> None:
    launch = plan(machine=make_machine(cores=16))
    assert bindings(launch) == ["0,1,2,3,4,5,6", "8,9,10,11,12,13,14"]
    assert [engine.cpus for engine in launch.engines] == [tuple(range(8)), tuple(range(8, 16))]


def test_one_thread_per_physical_core_while_there_are_enough_cores() -> None:
    launch = plan(machine=make_machine(cores=2, threads=2))
    assert bindings(launch) == ["0", "1"]
    assert [set(engine.cpus) for engine in launch.engines] == [
        set(core) for core in make_machine(cores=2, threads=2).cores
    ]
    assert bindings(plan(machine=make_machine(cores=1, threads=2))) == ["0", "1"]


def test_too_few_cores_are_shared_with_a_warning() -> None:
    launch = plan(UpSettings(model="m", prefill=2, decode=1), make_machine(cores=2))

    assert bindings(launch) == ["0", "1", "0"]
    assert "3 engine ranks share 2 cores" in launch.warnings[0]


def test_cpu_engines_start_eagerly_with_small_blocks_and_a_share_of_the_memory() -> None:
    launch = plan(machine=make_machine(memory_bytes=10 * GIB), weights_bytes=GIB)

    for engine in launch.engines:
        assert "--enforce-eager" in engine.argv
        assert option(engine, "--block-size") == "32"
        assert option(engine, "--kv-cache-memory-bytes") == str(int(0.4 * 4 * GIB) >> 20 << 20)
    assert "--enforce-eager" in launch.notes[0]


@pytest.mark.parametrize(("memory", "expected"), [(0, 256 << 20), (1000 * GIB, 8 * GIB)])
def test_the_kv_cache_of_a_cpu_engine_is_bounded(memory: int, expected: int) -> None:
    assert option(plan(machine=make_machine(memory_bytes=memory)).engines[0], "--kv-cache-memory-bytes") == str(
        expected
    )


def test_what_the_user_gives_is_not_given_twice() -> None:
    settings = UpSettings(
        model="m",
        engine_arg=("--block-size=64", "--no-enforce-eager"),
        decode_arg=("--kv_cache_memory_bytes", "1000"),
    )
    prefill, decode = plan(settings).engines

    assert prefill.argv[-2:] == ("--block-size=64", "--no-enforce-eager")
    assert option(prefill, "--block-size") is None and "--enforce-eager" not in prefill.argv
    assert option(prefill, "--kv-cache-memory-bytes") is not None
    assert option(decode, "--kv-cache-memory-bytes") is None


def test_vllms_own_variable_for_the_cpu_kv_cache_is_respected() -> None:
    launch = plan(environ={"VLLM_CPU_KVCACHE_SPACE": "4"})

    assert option(launch.engines[0], "--kv-cache-memory-bytes") is None


def test_gpus_are_handed_out_in_order() -> None:
    launch = plan(UpSettings(model="m", prefill=1, decode=1, tp=2), make_machine(gpus=4))

    assert [engine.env["CUDA_VISIBLE_DEVICES"] for engine in launch.engines] == ["0,1", "2,3"]
    assert "--enforce-eager" not in launch.engines[0].argv
    assert launch.notes == launch.warnings == ()


def test_too_few_gpus_is_an_error_that_counts_them() -> None:
    with pytest.raises(ConfigError, match="need 4 GPUs, and 3 are visible"):
        plan(UpSettings(model="m", tp=2), make_machine(gpus=3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prefill": 0}, "--prefill must be at least 1"),
        ({"port": 70000}, "--port"),
        ({"engine_arg": ("--port=1",)}, "sets --port itself"),
        ({"decode_arg": ("--tensor_parallel_size", "2")}, "sets --tensor-parallel-size itself"),
        ({"start_timeout_s": 0.0}, "--start-timeout-s must be positive"),
        ({"dilation": 2.0}, "--dilation needs --emulate"),
        ({"emulate": "tiny", "dilation": 0.0}, "--dilation must be positive, not 0.0"),
        ({"emulate": "tiny", "engine_arg": ("--dilation=2",)}, "sets --dilation itself"),
    ],
)
def test_contradictory_settings_are_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UpSettings(model="m", **wrong)


def test_flags_are_recognised_in_every_spelling() -> None:
    assert has_flag(("--max-model-len=1",), "--max-model-len")
    assert has_flag(("--max_model_len", "1"), "--max-model-len")
    assert not has_flag(("--max-model-length",), "--max-model-len")
    assert not has_flag(("max-model-len",), "--max-model-len")


@pytest.mark.parametrize("model", ["/no/such/model", "./nothing", "../nothing", "~/nothing", "some/deep/folder"])
def test_a_path_without_a_model_is_refused(model: str) -> None:
    with pytest.raises(ConfigError, match="there is no model at"):
        check_model(model)


def test_a_folder_without_config_is_refused_and_names_are_left_to_vllm(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        check_model(str(tmp_path))
    assert check_model("org/model") is None
    (tmp_path / "config.json").touch()
    assert check_model(str(tmp_path)) == tmp_path


def test_free_ports_are_distinct_and_never_those_of_outgoing_connections() -> None:
    ports = free_ports(20)

    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len(set(ports)) == 20
    assert max(ports) < lowest
