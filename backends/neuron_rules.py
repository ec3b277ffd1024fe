"""What neuronx-cc refuses, miscompiles or runs badly, as data: one line per rule, which `stablehlo_lint` looks for in a lowered program.

Codes such as EVRF035 are those of AWS's compiler documentation, where it has one; "known issues" is its page of that name about JAX.
Where the documents are silent the stricter reading was taken. A test demands an illegal program, and its legal twin, for every line.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

GENERATIONS = ("v2", "v3", "v4")
"""NeuronCores: v2 is Trn1 and Inf2, v3 is Trn2, v4 is Trn3."""

EXACT_INTEGERS = 2**24
"""Integers above it are rounded where they pass through float32, as in scatters, all-reduces and the vector engine's arithmetic."""
MAX_TOP_K = 256
"""The largest k that one top_k should have: the compiler's lowering is made for small ones, and this is our reading of that."""
HARD_MAX_TOP_K = 16384
"""Documented: EVRF013."""
LARGE_WEIGHT = 2**20
"""Elements from which transposing a weight in every step is worth a warning."""
MAX_INSTRUCTIONS = 5_000_000
"""Of one program: what the compiler's message (EVRF007) calls its typical limit. A flag of the compiler raises it."""

CALLEES = frozenset(
    {
        "Sharding",
        "SPMDFullToShardShape",
        "SPMDShardToFullShape",
        "annotate_device_placement",
        "AwsNeuronCustomNativeKernel",
    }
)
"""Targets of custom calls that the partitioner or neuronx-cc resolves."""


class Severity(enum.Enum):
    """What a finding means."""

    ERROR = "error"
    """The program does not compile, fails when it runs, or gives wrong numbers."""
    WARNING = "warning"
    """It may run, slowly or by luck."""


@dataclass(frozen=True)
class Rule:
    """One thing that a program for Neuron must not hold."""

    name: str
    severity: Severity
    forbids: str
    because: str
    """With the documented error code, where there is one."""
    remedy: str


def _error(name: str, forbids: str, because: str, remedy: str) -> Rule:
    return Rule(name, Severity.ERROR, forbids, because, remedy)


def _warning(name: str, forbids: str, because: str, remedy: str) -> Rule:
    return Rule(name, Severity.WARNING, forbids, because, remedy)


_ALL = (
    # Control flow and the host
    _error("conditional", "if and case", "lax.cond has no lowering (known issues)", "compute both sides and select"),
    _error(
        "dynamic-loop",
        "a while whose number of trips is not a constant",
        "only static loops are lowered (known issues)",
        "lax.scan or lax.fori_loop with a static length",
    ),
    _error(
        "host-callback",
        "calls of the host from within a program",
        "there are no host callbacks (known issues)",
        "return the value, and look at it on the host",
    ),
    _error(
        "custom-call",
        "custom calls that neither the partitioner nor neuronx-cc knows",
        "the target has no implementation on the device",
        "write it in jnp, or as an NKI kernel",
    ),
    _error(
        "dynamic-shape",
        "arrays whose shape is not static",
        "EMOD025",
        "pad to a static shape and mask what is not there",
    ),
    # Types
    _error("float64", "f64", "it is no type of the hardware", "float32; keep jax_enable_x64 off"),
    _error(
        "int64",
        "64-bit integers",
        "signed ones are cut to 32 bits without a word, unsigned constants are refused",
        "int32; keep jax_enable_x64 off",
    ),
    _error("complex", "complex numbers", "there are none (known issues)", "real and imaginary parts"),
    _error("fp8-e4m3fn", "f8E4M3FN on v2 and v3", "EVRF051", "f8E4M3, or f8E5M2"),
    # Products, reductions, orders
    _error(
        "integer-dot",
        "products and convolutions of integers",
        "EVRF035",
        "convert the operands to bfloat16 or float32; int8 values are exact in both",
    ),
    _error(
        "variadic-reduce",
        "reductions over several arrays at once, as argmax is",
        "they have no lowering (known issues)",
        "the maximum first, then the smallest index that reaches it",
    ),
    _error(
        "sort", "sort", "comparators are limited, and sorts turn into a top_k of full length", "bisect for a threshold"
    ),
    _error(
        "large-top-k",
        f"top_k above k = {MAX_TOP_K}",
        f"full-length lowerings fail; k above {HARD_MAX_TOP_K} is refused (EVRF013)",
        "bisect for a threshold, or take the top of groups first",
    ),
    _error("integer-top-k", "top_k of integers", "EVRF014", "convert to float32, exact below 2^24"),
    _error(
        "random-bits",
        "rng, and rng_bit_generator other than the default algorithm",
        "EVRF006; threefry is not fully supported",
        "quire.kernels.sampling.noise, or jax_default_prng_impl=rbg",
    ),
    _error(
        "reduce-precision", "reduce_precision", "it is not supported (known issues)", "convert to the type and back"
    ),
    _error(
        "narrow-right-shift",
        "arithmetic right shifts of anything but 32 bits",
        "they are wrong or refused (known issues)",
        "convert to int32 first, or shift logically",
    ),
    # Integers that pass through float32
    _error(
        "integer-scatter-reduce",
        "a scatter that combines integers or booleans",
        "EVRF016",
        "count in float32, exact below 2^24",
    ),
    _error(
        "inexact-integers",
        "adding, multiplying, scattering or all-reducing integers that may exceed 2^24",
        "they pass through float32 (EVRF060, EVRF061, EVRF063)",
        "keep numbers small, on the host, or in bitwise operations",
    ),
    # Indices
    _error(
        "unclipped-index",
        "indices that are not provably within bounds",
        "an index outside is a runtime error, not clamped or dropped",
        "jnp.clip them right before, to the bounds of what is indexed",
    ),
    _warning(
        "large-index-space",
        "gathers and scatters over more than 2^24 places",
        "a place's number, if computed flat, is not exact in float32",
        "index fewer or smaller axes at once",
    ),
    # Time and size
    _warning(
        "transposed-weight",
        "a product that contracts axis 1 of a large [out, in] matrix",
        "it is lowered with transposes of the matrix in every call",
        "store the weight as [in, out]",
    ),
    _warning(
        "unlisted-op",
        "an operation that the linter has no opinion on",
        "whether neuronx-cc lowers it was never looked up",
        "one of the common operations, or look it up and list it in stablehlo_checks",
    ),
    _error(
        "too-many-instructions",
        f"programs estimated at over {MAX_INSTRUCTIONS:,} instructions",
        "EVRF007, EXTP004, EBVF030; the estimate is rough and the limit is the documented default",
        "fewer prefill tokens per step, fewer decode steps per dispatch, or more devices",
    ),
)

RULES = {rule.name: rule for rule in _ALL}
