"""Reading StableHLO through jax's MLIR bindings: types, attributes, constants, and the source line that an operation comes from.

Types, attributes and locations are read from their text, which is the same from jax 0.7 on; classes of the bindings come and go.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

_TENSOR = re.compile(r"tensor<((?:[\d?]+x)*)([^,>]+(?:<[^>]*>)?)")
_FRAME = re.compile(r'"((?:[^"\\]|\\.)*)"\("((?:[^"\\]|\\.)*)":(\d+)')
_FILE = re.compile(r'"((?:[^"\\]|\\.)*)":(\d+)')
_PACKAGE = Path(__file__).resolve().parent.parent
"""The folder that holds this package's floors; a file below it is quire's, or its tests'."""
_ITEM_BYTES = {"i1": 1, "f64": 8, "complex": 8}


@dataclass(frozen=True)
class Tensor:
    """A type: `element` as MLIR spells it (f32, bf16, i32, ui8, i1); "?" in the shape is -1. Tokens have no shape and element ""."""

    shape: tuple[int, ...]
    element: str

    @property
    def size(self) -> int:
        return math.prod(1 if dim < 0 else dim for dim in self.shape)

    @property
    def is_integer(self) -> bool:
        return re.fullmatch(r"u?i\d+", self.element) is not None and self.element != "i1"

    @property
    def item_bytes(self) -> int:
        bits = re.search(r"\d+", self.element)
        return _ITEM_BYTES.get(self.element, max(1, int(bits.group()) // 8) if bits else 4)

    def __str__(self) -> str:
        return f"{self.element}[{','.join('?' if dim < 0 else str(dim) for dim in self.shape)}]"


@dataclass(frozen=True)
class SourceLine:
    """Where in Python an operation was made; line 0 where the program does not say."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}" if self.line else "an unknown place"


NOWHERE = SourceLine("", 0, "")


def tensor(value: Any) -> Tensor:
    """The type of a value."""
    return _tensor(str(value.type))


@cache
def _tensor(text: str) -> Tensor:
    match = _TENSOR.match(text)
    if match is None:
        return Tensor((), "")
    dims = tuple(-1 if dim == "?" else int(dim) for dim in match[1].split("x")[:-1])
    return Tensor(dims, match[2])


def name_of(op: Any) -> str:
    """As `stablehlo.add`."""
    name: str = op.operation.name
    return name


def attribute(op: Any, name: str) -> str | None:
    """An attribute's text."""
    attributes = op.operation.attributes
    return str(attributes[name]) if name in attributes else None


def numbers(op: Any, name: str) -> tuple[int, ...]:
    """An attribute that is an array of numbers, `array<i64: 1, 8>` or `[1, 8]`; empty where it is absent or empty."""
    text = attribute(op, name) or ""
    return tuple(int(digits) for digits in re.findall(r"-?\d+", re.sub(r"[iu]+\d+", "", text)))


def field(op: Any, name: str, part: str) -> tuple[int, ...]:
    """The numbers of one part of a structured attribute: of `#stablehlo.gather<offset_dims = [1], ...>`, say, offset_dims."""
    match = re.search(rf"\b{part} = (\[[^\]]*\]|\d+)", attribute(op, name) or "")
    return tuple(int(digits) for digits in re.findall(r"\d+", match[1])) if match else ()


def constant_bounds(op: Any) -> tuple[float, float] | None:
    """The least and the greatest element of a `stablehlo.constant`; None where they are not numbers, or are too many to look at."""
    value = op.operation.attributes["value"]
    kind = tensor(op.operation.results[0])
    if getattr(value, "is_splat", False):
        splat: float | None = getattr(value.get_splat_value(), "value", None)
        if splat is None or math.isnan(splat):
            return None
        number = _signless(float(splat) if isinstance(splat, float) else int(splat), kind)
        return number, number
    if kind.size == 0 or not (kind.is_integer or kind.element == "i1"):
        return None
    try:
        elements = np.asarray(value)
    except (BufferError, TypeError, ValueError):  # elements packed in bits, or kept elsewhere
        return None
    return int(elements.min()), int(elements.max())


def _signless(value: float, kind: Tensor) -> float:
    """Unsigned constants are told as signed ones by some versions of the bindings."""
    if kind.element.startswith("ui") and value < 0:
        return value + (1 << int(kind.element[2:]))
    return value


def source_line(op: Any) -> SourceLine | None:
    """The innermost frame of quire's, else the innermost of all; jax's own frames are not recorded. None where there is no frame."""
    return _source_line(str(op.operation.location))


@cache
def _source_line(location: str) -> SourceLine | None:
    frames = [SourceLine(file, int(line), function) for function, file, line in _FRAME.findall(location)]
    if not frames:
        frames = [SourceLine(file, int(line), "?") for file, line in _FILE.findall(location)]
    own = [frame for frame in frames if _is_own(frame.file)]
    return own[0] if own else frames[0] if frames else None


@cache
def _is_own(file: str) -> bool:
    try:
        return Path(file).resolve().is_relative_to(_PACKAGE) and "site-packages" not in Path(file).parts
    except OSError:
        return False
