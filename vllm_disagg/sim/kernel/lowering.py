"""Machine code for the two things that the kernel does most: whole numbers, and one element of an array.

numba finds out for each `a + b` and each `array[i, j]` anew which of its many implementations is meant, and lets an
index count from the end. That is most of the work of compiling the kernel, where all arrays are contiguous, nearly all
numbers are 64 bits long, and no index is negative.
"""

from __future__ import annotations

import operator
from typing import Any

from numba.core import cgutils, types
from numba.core.compiler_machinery import register_pass
from numba.core.lowering import Lower
from numba.core.typed_passes import NativeLowering

_ARITHMETIC = {
    operator.add: "add", operator.iadd: "add", operator.sub: "sub", operator.isub: "sub", operator.mul: "mul",
    operator.imul: "mul",
}  # fmt: skip
_COMPARISONS = {
    operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.eq: "==", operator.ne: "!=",
}  # fmt: skip


class _Lower(Lower):
    """numba's, with a short way for these two; anything else goes its way."""

    def lower_binop(self, resty: Any, expr: Any, op: Any) -> Any:
        signature = self.fndesc.calltypes[expr]
        if all(kind == types.int64 for kind in signature.args) and (op in _ARITHMETIC or op in _COMPARISONS):
            left, right = (
                self.context.cast(self.builder, self.loadvar(side.name), self.typeof(side.name), types.int64)
                for side in (expr.lhs, expr.rhs)
            )
            if op in _ARITHMETIC:
                found = getattr(self.builder, _ARITHMETIC[op])(left, right)
            else:
                found = self.builder.icmp_signed(_COMPARISONS[op], left, right)
            return self.context.cast(self.builder, found, signature.return_type, resty)
        return super().lower_binop(resty, expr, op)

    def lower_getitem(self, resty: Any, expr: Any, value: Any, index: Any, signature: Any) -> Any:
        kind = self.typeof(value.name)
        if self._is_element(kind, self.typeof(index.name)):
            found = self.builder.load(self._pointer(kind, value, index))
            return self.context.cast(self.builder, found, kind.dtype, resty)
        return super().lower_getitem(resty, expr, value, index, signature)

    def lower_setitem(self, target_var: Any, index_var: Any, value_var: Any, signature: Any) -> Any:
        kind = self.typeof(target_var.name)
        if not self._is_element(kind, self.typeof(index_var.name)):
            return super().lower_setitem(target_var, index_var, value_var, signature)
        value = self.context.cast(self.builder, self.loadvar(value_var.name), self.typeof(value_var.name), kind.dtype)
        return self.builder.store(value, self._pointer(kind, target_var, index_var))

    @staticmethod
    def _is_element(kind: Any, index: Any) -> bool:
        """Whether an index names one number of a contiguous array."""
        if not (isinstance(kind, types.Array) and kind.layout == "C" and kind.dtype in (types.int64, types.float64)):
            return False
        axes = index.types if isinstance(index, types.BaseTuple) else (index,)
        return len(axes) == kind.ndim and all(types.unliteral(axis) == types.int64 for axis in axes)

    def _pointer(self, kind: Any, array: Any, index: Any) -> Any:
        fields = self.context.data_model_manager[kind]
        value, places = self.loadvar(array.name), self.loadvar(index.name)
        data, shape = (self.builder.extract_value(value, fields.get_field_position(name)) for name in ("data", "shape"))
        axes = cgutils.unpack_tuple(self.builder, places) if kind.ndim > 1 else [places]
        at = axes[0]
        for axis in range(1, kind.ndim):
            at = self.builder.add(self.builder.mul(at, self.builder.extract_value(shape, axis)), axes[axis])
        return self.builder.gep(data, [at], inbounds=True)


@register_pass(mutates_CFG=True, analysis_only=False)
class ShortLowering(NativeLowering):
    """To be run in the place of numba's own."""

    _name = "short_lowering"

    @property
    def lowering_class(self) -> Any:
        """What makes machine code of typed functions."""
        return _Lower
