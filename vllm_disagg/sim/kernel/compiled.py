"""How the kernel is compiled: decorators, and what tells one version of it from another."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numba import njit

_Part: Any = None
_Whole: Any = None
with contextlib.suppress(ImportError):
    from vllm_disagg.sim.kernel.pipeline import Part as _Part
    from vllm_disagg.sim.kernel.pipeline import Whole as _Whole

_F = TypeVar("_F", bound=Callable[..., Any])

_SOURCES = ("sim/kernel", "core/scheduling")
"""Folders whose functions are compiled into it."""


def sources() -> str:
    """A digest of all that is compiled. numba keeps what it has compiled on disk and looks at the file of one function
    only to see whether that is still right; this has to be among what that function refers to."""
    package = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for file in sorted((package / folder).glob("*.py")):
            digest.update(file.read_bytes())
    for name in ("outcome.py", "reference/state.py"):
        digest.update((package / "sim" / name).read_bytes())
    return digest.hexdigest()


def compiled(function: _F) -> _F:
    """numba's compiler, with its result kept on disk where that can be written."""
    try:
        return _njit(function, _Whole, cache=True, nogil=True)
    except RuntimeError:  # nowhere to keep it
        return _njit(function, _Whole, nogil=True)


def inner(function: _F) -> _F:
    """The same for what only compiled functions call: no entry from Python, and it is kept with its caller. It makes no
    arrays or lists, so that nobody has to count who refers to them; that would be most of the work of compiling."""
    return _njit(function, _Part, no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False)


def inner_in_loops(function: _F) -> _F:
    """As `inner`, and always part of its caller. An array is handed over as some ten numbers, which costs more than a
    short function that is called for each request of a step."""
    return _njit(function, _Part, no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False, forceinline=True)


def inner_with_lists(function: _F) -> _F:
    """As `inner`, for what makes lists."""
    return _njit(function, _Part, no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=True)


def _njit(function: _F, pipeline: Any, **options: Any) -> _F:
    if pipeline is not None:
        options["pipeline_class"] = pipeline
    return njit(error_model="numpy", **options)(function)  # type: ignore[no-any-return]
