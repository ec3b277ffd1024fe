"""Operators of the ALUs and functions of ScalarE. In NKI both are names of `nki.language`, handed to instructions as `op`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from quire.kernels.nki.rules import refuse


@dataclass(frozen=True)
class Operator:
    """A binary operator. `reduce` is its numpy ufunc where instructions reduce by it."""

    name: str
    apply: Callable[[np.ndarray, np.ndarray], np.ndarray]
    is_bitwise: bool = False
    reduce: np.ufunc | None = None


@dataclass(frozen=True)
class Function:
    """An activation function and the documented range of its argument, or of its argument's magnitude."""

    name: str
    apply: Callable[[np.ndarray], np.ndarray]
    low: float = -math.inf
    high: float = math.inf

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Applies it to float32. NaN and infinities pass, as the range is about finite arguments."""
        outside = np.isfinite(values) & ((values < self.low) | (values > self.high))
        if outside.any():
            refuse(
                "activation-range",
                f"{self.name} of {values[outside].flat[0]} is outside [{self.low:.3g}, {self.high:.3g}]; clamp it first",
            )
        with np.errstate(all="ignore"):
            return self.apply(values).astype(np.float32)


def _truth(compare: np.ufunc) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda a, b: compare(a, b).astype(np.float32)


def _abs_max(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(a), np.abs(b))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (np.tanh(0.5 * x) + 1)


_erf = np.vectorize(math.erf, otypes=[np.float32])

OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("add", np.add, reduce=np.add),
        Operator("subtract", np.subtract),
        Operator("multiply", np.multiply, reduce=np.multiply),
        Operator("maximum", np.maximum, reduce=np.maximum),
        Operator("minimum", np.minimum, reduce=np.minimum),
        Operator("abs_max", _abs_max),
        Operator("power", np.power),
        Operator("equal", _truth(np.equal)),
        Operator("not_equal", _truth(np.not_equal)),
        Operator("less", _truth(np.less)),
        Operator("less_equal", _truth(np.less_equal)),
        Operator("greater", _truth(np.greater)),
        Operator("greater_equal", _truth(np.greater_equal)),
        Operator("logical_and", _truth(np.logical_and)),
        Operator("logical_or", _truth(np.logical_or)),
        Operator("logical_xor", _truth(np.logical_xor)),
        Operator("bitwise_and", np.bitwise_and, is_bitwise=True, reduce=np.bitwise_and),
        Operator("bitwise_or", np.bitwise_or, is_bitwise=True, reduce=np.bitwise_or),
        Operator("bitwise_xor", np.bitwise_xor, is_bitwise=True, reduce=np.bitwise_xor),
        Operator("left_shift", np.left_shift, is_bitwise=True),
        Operator("right_shift", np.right_shift, is_bitwise=True),
    )
}

# Names that NKI has and that are no operator of the ALU. They exist here so that a kernel which uses them is told so.
NOT_OPERATORS = ("divide", "mod", "fmod")

FUNCTIONS = {
    function.name: function
    for function in (
        Function("copy", lambda x: x),
        Function("exp", np.exp),
        Function("square", np.square),
        Function("sqrt", np.sqrt, 2.0**-116, 2.0**118),
        Function("rsqrt", lambda x: 1 / np.sqrt(x), 2.0**-87, 2.0**97),
        Function("log", np.log, 2.0**-64, 2.0**64),
        Function("sigmoid", _sigmoid),
        Function("silu", lambda x: x * _sigmoid(x)),
        Function("tanh", np.tanh),
        Function("gelu", lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2)))),
        Function("relu", lambda x: np.maximum(x, 0)),
        Function("erf", _erf),
        Function("softplus", lambda x: np.logaddexp(x, 0)),
        Function("sin", np.sin, -math.pi, math.pi),
    )
}

RECIPROCAL_RANGE = (2.0**-42, 2.0**42)


def operator_of(op: object, instruction: str, *, allowed: Callable[[Operator], bool] = lambda _: True) -> Operator:
    """`op` as an operator that `instruction` takes."""
    if not isinstance(op, Operator) or not allowed(op):
        refuse(
            "alu-op", f"{getattr(op, 'name', op)} is no operator of {instruction}; divide is multiply by a reciprocal"
        )
    return op


def function_of(op: object) -> Function:
    """`op` as an activation function."""
    if not isinstance(op, Function):
        refuse("activation-function", f"{getattr(op, 'name', op)} is none of {', '.join(FUNCTIONS)}")
    return op


def reciprocal(values: np.ndarray) -> np.ndarray:
    """1 / x in the range that is documented."""
    low, high = RECIPROCAL_RANGE
    outside = np.isfinite(values) & ((np.abs(values) < low) | (np.abs(values) > high))
    if outside.any():
        refuse("activation-range", f"reciprocal of {values[outside].flat[0]} is outside ±2^±42; clamp it first")
    return (np.float32(1) / values).astype(np.float32)
