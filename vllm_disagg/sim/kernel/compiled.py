"""How the kernel is compiled: decorators, and what tells one version of it from another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from numba import njit

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
        return njit(cache=True, nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]
    except RuntimeError:  # nowhere to keep it
        return njit(nogil=True, error_model="numpy")(function)  # type: ignore[no-any-return]


def inner(function: _F) -> _F:
    """The same for what only compiled functions call: no entry from Python, and it is kept with its caller. It makes no
    arrays or lists, so that nobody has to count who refers to them; that would be most of the work of compiling."""
    return _njit(function, _nrt=False)


def inner_with_lists(function: _F) -> _F:
    """As `inner`, for what makes lists."""
    return _njit(function, _nrt=True)


def _njit(function: _F, **options: Any) -> _F:
    more = {"pipeline_class": _Part} if _Part is not None else {}
    return njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, **more, **options)(function)  # type: ignore[no-any-return]


def _part() -> Any:
    """A compiler for what only compiled functions call. numba's own optimises each function with all that it calls, and
    makes machine code of it, before it does the same for the caller, which contains them: with calls ten deep most of
    the work is done ten times. This one leaves both to the outermost function.

    Returns:
        None where this numba is built in another way; it then compiles as it always does, for longer.
    """
    try:
        from numba.core.codegen import JITCodeLibrary
        from numba.core.compiler import CompilerBase, DefaultPassBuilder
    except ImportError:
        return None
    steps = ("_optimize_final_module", "_finalize_final_module", "_finalize_dynamic_globals", "_final_module")
    if not all(hasattr(JITCodeLibrary, step) for step in steps[:3]):
        return None

    class Generator:
        """A library's code generator, which would set a variable of the machine code that there is not."""

        def __init__(self, inside: Any) -> None:
            self._inside = inside

        def set_env(self, *_: Any) -> None:
            """Of use to functions that raise or print, and to no others."""

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inside, name)

    class PartLibrary(JITCodeLibrary):
        @property
        def codegen(self) -> Any:
            return Generator(self._codegen)

        def _optimize_final_module(self) -> None:
            pass

        def _finalize_final_module(self) -> None:
            self._finalize_dynamic_globals()
            self._finalized = True

        def get_pointer_to_function(self, name: str) -> int:
            self._ensure_finalized()
            return 0  # there is no entry from Python

    class Part(CompilerBase):
        def define_pipelines(self) -> list[Any]:
            codegen = self.state.targetctx.codegen()
            self.state.library = PartLibrary(codegen, self.state.func_id.func_qualname)
            return [DefaultPassBuilder.define_nopython_pipeline(self.state)]

    return Part


_Part = _part()
