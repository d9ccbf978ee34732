"""The plugin's flags, as `vllm serve` parses them, and its silence when they are not used."""

from __future__ import annotations

import argparse
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_disagg import engine_flags, plugin, seams
from vllm_disagg.config import KEY_ENV, EngineSettings, default_of
from vllm_disagg.errors import VllmUnavailable

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(KEY_ENV, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return None


def parse(*argv: str) -> argparse.Namespace:
    plugin.register()
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    return parser.parse_args(["--model", "m", *argv])


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse(*argv)
    assert exit_.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_registering_twice_is_as_registering_once() -> None:
    plugin.register()
    wrapped = EngineArgs.add_cli_args

    plugin.register()

    assert EngineArgs.add_cli_args is wrapped
    assert KVConnectorFactory._registry[plugin.CONNECTOR]().__name__ == plugin.CONNECTOR


def test_without_our_flags_every_field_is_as_without_us(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    with monkeypatch.context() as without_us:
        without_us.setattr(EngineArgs, "add_cli_args", staticmethod(EngineArgs.add_cli_args.__wrapped__))
        plain = make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args(["--model", "m"])

    ours = parse()

    assert vars(ours) == vars(plain)


@pytest.mark.parametrize(("role", "kv_role"), [("prefill", "kv_producer"), ("decode", "kv_consumer")])
def test_a_role_becomes_vllms_own_fields(role: str, kv_role: str) -> None:
    port = free_port()
    namespace = parse("--kv-role", role, "--kv-lease-s", "12", "--kv-control-port", port)

    transfer = namespace.kv_transfer_config
    assert (transfer.kv_connector, transfer.kv_role) == ("DisaggConnector", kv_role)
    assert transfer.kv_load_failure_policy == "recompute"
    settings = EngineSettings.from_extra_config(transfer.kv_connector_extra_config)
    assert (settings.role, settings.lease_s, settings.control_port) == (role, 12.0, int(port))
    assert settings.pull_timeout_s == default_of(EngineSettings, "pull_timeout_s")
    assert namespace.scheduler_cls == f"vllm_disagg.scheduler.{role}_scheduler"
    assert namespace.middleware == [engine_flags.FRONTEND]
    assert not [name for name in vars(namespace) if name.startswith("kv_") and name not in _vllms_own()]
    assert AsyncEngineArgs.from_cli_args(namespace).scheduler_cls == namespace.scheduler_cls


def test_the_order_of_flags_does_not_matter() -> None:
    port = free_port()

    one = parse("--kv-lease-s", "9", "--kv-control-port", port, "--kv-role", "prefill")
    two = parse("--kv-role", "prefill", "--kv-control-port", port, "--kv-lease-s", "9")

    assert one.kv_transfer_config.kv_connector_extra_config == two.kv_transfer_config.kv_connector_extra_config


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--kv-role", "both"], "'prefill', 'decode'"),
        (["--kv-lease-s", "5"], "--kv-lease-s needs --kv-role"),
        (["--kv-role", "decode", "--kv-lease-s", "-1"], "kv lease must be a positive number"),
        (["--kv-role", "decode", "--kv-lease-s", "soon"], "invalid float value"),
        (["--kv-role", "decode", "--kv-control-port", "0"], "between 1 and 65535"),
        (["--kv-role", "decode", "--kv-transport", "pigeon"], "invalid choice: 'pigeon'"),
        (["--kv-role", "decode", "--kv-offloading-size", "4"], "--kv-offloading-size"),
        (["--kv-role", "decode", "--scheduler-cls", "a.B"], "--scheduler-cls"),
        (["--kv-role", "decode", "--data-parallel-size", "2"], "--data-parallel-size"),
        (["--kv-role", "decode", "--distributed-executor-backend", "ray"], "--distributed-executor-backend ray"),
        (["--kv-role", "decode", "--enable-sleep-mode"], "--enable-sleep-mode"),
        (["--kv-role", "decode", "--kv-key-file", "/nowhere/key"], "cannot read the deployment key /nowhere/key"),
    ],
)
def test_what_contradicts_a_role_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], argv: list[str], named: str
) -> None:
    assert named in refusal(capsys, *argv)


@pytest.mark.parametrize("first", [True, False])
def test_a_kv_transfer_config_is_refused_wherever_it_stands(capsys: pytest.CaptureFixture[str], first: bool) -> None:
    theirs = ["--kv-transfer-config", '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}']
    ours = ["--kv-role", "decode"]

    assert "--kv-transfer-config" in refusal(capsys, *(theirs + ours if first else ours + theirs))


@pytest.mark.parametrize("variable", ["VLLM_USE_RUST_FRONTEND", "VLLM_ALLOW_INSECURE_SERIALIZATION"])
def test_unsupported_environments_are_refused_by_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    plugin.register()
    monkeypatch.setenv(variable, "1")

    assert variable in refusal(capsys, "--kv-role", "decode")


def test_a_busy_control_port_is_refused_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])

        assert "--kv-control-port" in refusal(capsys, "--kv-role", "prefill", "--kv-control-port", port)
        assert parse("--kv-role", "decode", "--kv-control-port", port).kv_transfer_config  # decode does not listen


def test_every_flag_is_in_the_help_with_its_default() -> None:
    plugin.register()
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    help_of = {flag: str(action.help) for action in parser._actions for flag in action.option_strings}

    assert help_of["--kv-role"]
    for name, (flag, _) in engine_flags._FLAGS.items():
        default = default_of(EngineSettings, name)
        assert default is None or f"(default: {default})" in help_of[flag]


def test_vllm_has_every_seam_we_hold_on_to() -> None:
    seams.check_seams()


def test_a_seam_that_moved_is_named_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "vllm.v1.core.block_pool:BlockPool.touch"
    monkeypatch.setattr(seams, "SEAMS", {place: ("self", "blocks", "owner")})

    with pytest.raises(VllmUnavailable, match=rf"vLLM {seams.vllm_version()}.*BlockPool.touch.*'owner'"):
        seams.check_seams()


def test_a_seam_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "SEAMS", {"vllm.v1.nowhere:Nothing": ()})

    with pytest.raises(VllmUnavailable, match=r"vllm\.v1\.nowhere:Nothing"):
        seams.check_seams()


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.320.0", "1.0.0", "0.1.dev1+g1234567"])
def test_an_unknown_vllm_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: str
) -> None:
    monkeypatch.delenv(seams.OVERRIDE_ENV, raising=False)
    monkeypatch.setattr("vllm.version.__version__", version)

    message = refusal(capsys, "--kv-role", "decode")

    assert f"vLLM {version} is unknown" in message
    assert "0.32" in message and "0.33" in message
    assert f"{seams.OVERRIDE_ENV}=1" in message
    with pytest.raises(VllmUnavailable, match=f"vLLM {re.escape(version)} is unknown"):
        seams.check_seams()
    assert parse("--max-num-seqs", "5").max_num_seqs == 5  # without a role vLLM is none of our business


@pytest.mark.parametrize(("version", "lines"), [("0.32.0+cpu", 0), ("0.32.1rc1", 0), ("0.33.0", 1)])
def test_a_known_vllm_starts_and_an_untested_one_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str, lines: int
) -> None:
    monkeypatch.setattr("vllm.version.__version__", version)

    seams.check_version()

    assert [record.getMessage() for record in caplog.records if record.name == seams.__name__] == (
        [f"vllm.untested version={version} tested=0.32"] * lines
    )


def test_whoever_knows_better_may_start_with_any_vllm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vllm.version.__version__", "0.99.0")
    monkeypatch.setattr(seams, "SEAMS", {**seams.SEAMS, "vllm.v1.nowhere:Nothing": ("self",)})
    monkeypatch.setenv(seams.OVERRIDE_ENV, "yes")
    with pytest.raises(VllmUnavailable):
        seams.check_seams()

    monkeypatch.setenv(seams.OVERRIDE_ENV, "1")
    seams.check_seams()
    assert parse("--kv-role", "decode").scheduler_cls == "vllm_disagg.scheduler.decode_scheduler"

    told = "\n".join(record.getMessage() for record in caplog.records if record.name == seams.__name__)
    assert "vLLM 0.99.0 is unknown" in told and "vllm.v1.nowhere:Nothing" in told


def _vllms_own() -> set[str]:
    return {name for name in vars(parse()) if name.startswith("kv_")}
