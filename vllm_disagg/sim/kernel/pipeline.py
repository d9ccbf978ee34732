"""Shorter ways through numba's compiler than its own. They rest on what numba does not promise to keep: where it is
built in another way, importing this fails, and `compiled` does without."""

from __future__ import annotations

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import PassManager

from vllm_disagg.sim.kernel.inference import ShortInference
from vllm_disagg.sim.kernel.lowering import ShortLowering

_NEEDLESS = (
    "WithLifting", "InlineClosureLikes", "RewriteSemanticConstants", "GenericRewrites", "RewriteDynamicRaises",
    "MakeFunctionToJitFunction", "InlineInlinables", "FindLiterallyCalls", "LiteralUnroll",
    "LiteralPropagationSubPipelinePass", "InlineOverloads", "NopythonRewrites", "AnnotateTypes",
    "DumpParforDiagnostics",
)  # fmt: skip
"""Passes for closures, comprehensions, literal types, exceptions and whole arrays. A function without any of these
compiles to the same without them, and faster."""

_STEPS = (
    "finalize", "_finalize_dynamic_globals", "_raise_if_finalized", "add_linking_library", "enable_object_caching",
)  # fmt: skip

if not all(hasattr(JITCodeLibrary, step) for step in _STEPS):
    raise ImportError("this numba finishes its libraries in another way")


class Whole(CompilerBase):
    """For the function that is called from Python."""

    def define_pipelines(self) -> list[PassManager]:
        """Asked by numba, once for each function."""
        self.state.library = _WholeLibrary(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        self.state.library.enable_object_caching()
        return [_without_needless(DefaultPassBuilder.define_nopython_pipeline(self.state))]


class Part(CompilerBase):
    """For what only compiled functions call. numba's own compiler optimises each function with all that it calls, and
    makes machine code of it, before it does the same for the caller, which contains them: with calls ten deep most of
    the work is done ten times. This one leaves both to the outermost function, which is joined with the others."""

    def define_pipelines(self) -> list[PassManager]:
        """See `Whole`. What makes lists needs all passes."""
        codegen = self.state.targetctx.codegen()
        self.state.library = _PartLibrary(codegen, self.state.func_id.func_qualname)
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        return [passes if self.state.flags.nrt else _without_needless(passes)]


class _Generator:
    """A library's code generator, which would set a variable of the machine code that there is not."""

    def __init__(self, inside: Any) -> None:
        self._inside = inside

    def set_env(self, *_: Any) -> None:
        """Of use to functions that raise or print, and to no others."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inside, name)


class _PartLibrary(JITCodeLibrary):
    @property
    def codegen(self) -> Any:
        return _Generator(self._codegen)

    def finalize(self) -> None:
        """Called when its function has been translated."""
        self._raise_if_finalized()
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0  # there is no entry from Python


class _WholeLibrary(JITCodeLibrary):
    def finalize(self) -> None:
        """Joined with its parts, and theirs: they do not contain each other."""
        for library in self._linking_libraries:  # grows meanwhile
            for part in library._linking_libraries if isinstance(library, _PartLibrary) else ():
                if part not in self._linking_libraries:
                    self._linking_libraries.append(part)
        super().finalize()


_SHORTER = {"NopythonTypeInference": ShortInference, "NativeLowering": ShortLowering}


def _without_needless(passes: PassManager) -> PassManager:
    """The same passes, each once, the longest ones shorter."""
    kept, seen = PassManager(passes.pipeline_name), set()
    for step, description in passes.passes:
        if step.__name__ not in _NEEDLESS and step not in seen:
            kept.add_pass(_SHORTER.get(step.__name__, step), description)
            seen.add(step)
    kept.finalize()
    return kept
