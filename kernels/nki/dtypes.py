"""NKI's dtypes, which are strings, as numpy's; and the conversions that every engine does on its way in and out."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from quire.kernels.nki.core import current, generation_name
from quire.kernels.nki.rules import refuse

# tfloat32 is documented and left out: what rounds to it, and when, is not.
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float8_e4m3": np.dtype(ml_dtypes.float8_e4m3),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "bool": np.dtype(np.bool_),
}
FLOATS = frozenset(name for name in DTYPES if "float" in name)
INTEGERS = frozenset(name for name in DTYPES if "int" in name)
EXACT_INTEGERS = 1 << 24  # up to here float32 holds every integer


def numpy_dtype(name: str) -> np.dtype:
    """The numpy type of an NKI dtype that this generation has."""
    if name not in DTYPES:
        refuse("dtype", f"{name!r} is none of {', '.join(DTYPES)}")
    if name == "float8_e4m3fn" and current().generation.number < 4:
        refuse("dtype", f"float8_e4m3fn needs gen4, this is {generation_name()}; use float8_e4m3")
    return DTYPES[name]


def nki_dtype(dtype: np.dtype) -> str:
    """The name of a numpy type, as arrays bring it into a kernel."""
    if str(dtype) not in DTYPES:
        refuse("dtype", f"an array of {dtype} cannot enter a kernel; convert it to one of {', '.join(DTYPES)}")
    return str(dtype)


def to_float32(values: np.ndarray, name: str) -> np.ndarray:
    """What an engine computes with, whatever it reads."""
    if name in INTEGERS and np.any(np.abs(values.astype(np.int64)) > EXACT_INTEGERS):
        largest = np.abs(values.astype(np.int64)).max()
        refuse(
            "int-precision",
            f"{largest} of {name} is above 2^24 and arithmetic is float32; keep it smaller or on GpSimd",
        )
    return values.astype(np.float32)


def convert(values: np.ndarray, name: str) -> np.ndarray:
    """Float32 results in a tensor's dtype: rounded to nearest even, infinite where too large."""
    dtype = DTYPES[name]
    if name in FLOATS:
        with np.errstate(over="ignore"):
            return values.astype(dtype)
    limits: Any = np.iinfo(dtype) if name in INTEGERS else None
    low, high = (limits.min, limits.max) if limits else (0, 1)
    whole = np.isfinite(values) & (values == np.floor(np.where(np.isfinite(values), values, 0.5)))
    fits = whole & (values >= low) & (values <= high)
    if not fits.all():
        refuse("int-cast", f"{values[~fits].flat[0]} is no value of {name}; round and clamp it first")
    return values.astype(dtype)
