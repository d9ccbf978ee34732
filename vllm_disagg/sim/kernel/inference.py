"""What operators make of numbers, and of one element of an array, found out once.

numba asks all implementations of an operator at every place where it stands, with the types as they are and as they
might be, and makes an error text for each that does not fit. The kernel has some thousand such places and few types.
"""

from __future__ import annotations

import math
import operator
from typing import Any

from numba.core import types
from numba.core.compiler_machinery import register_pass
from numba.core.typed_passes import NopythonTypeInference

_OPERATORS = frozenset(
    (
        operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv,
        operator.floordiv, operator.mod, operator.neg, operator.not_, operator.lt, operator.le, operator.gt,
        operator.ge, operator.eq, operator.ne, operator.getitem, bool, float, int, len, math.isnan, max, min, range,
    )
)  # fmt: skip

_known: dict[tuple[Any, ...], Any] = {}


class _Context:
    """numba's typing context, with a memory."""

    def __init__(self, inside: Any) -> None:
        self._inside = inside

    def resolve_function_type(self, function: Any, args: Any, named: Any) -> Any:
        """The signature of a call."""
        if named or getattr(function, "typing_key", function) not in _OPERATORS or not _are_plain(args):
            return self._inside.resolve_function_type(function, args, named)
        return self._remembered((self._inside, function, *args), self._inside.resolve_function_type, function, args, {})

    def resolve_setitem(self, *args: Any) -> Any:
        """The signature of `array[index] = value`."""
        if not _are_plain(args):
            return self._inside.resolve_setitem(*args)
        return self._remembered((self._inside, operator.setitem, *args), self._inside.resolve_setitem, *args)

    def _remembered(self, key: tuple[Any, ...], resolve: Any, *args: Any) -> Any:
        if key not in _known:
            _known[key] = resolve(*args)
        return _known[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inside, name)


def _are_plain(args: Any) -> bool:
    """Numbers, or an array and the place of one of its elements: what numba itself translates, and not in Python."""
    return all(_is_number(kind) or isinstance(kind, types.Array) or _is_place(kind) for kind in args)


def _is_number(kind: Any) -> bool:
    return isinstance(types.unliteral(kind), types.Integer | types.Float | types.Boolean)


def _is_place(kind: Any) -> bool:
    return isinstance(kind, types.BaseTuple) and all(isinstance(types.unliteral(axis), types.Integer) for axis in kind)


@register_pass(mutates_CFG=True, analysis_only=False)
class ShortInference(NopythonTypeInference):
    """To be run in the place of numba's own."""

    _name = "short_inference"

    def run_pass(self, state: Any) -> bool:
        """Called by numba, once for each function."""
        context, state.typingctx = state.typingctx, _Context(state.typingctx)
        try:
            changed: bool = super().run_pass(state)
        finally:
            state.typingctx = context
        return changed
