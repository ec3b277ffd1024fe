"""One function per group of rules: what an operation breaks, as the rule's name and a sentence with the numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from quire.backends.neuron_rules import (
    CALLEES,
    EXACT_INTEGERS,
    HARD_MAX_TOP_K,
    LARGE_WEIGHT,
    MAX_TOP_K,
)
from quire.backends.stablehlo_ir import Tensor, attribute, field, numbers, tensor
from quire.backends.stablehlo_ranges import Fact, is_overwriting, raw_sum_or_product, whole
from quire.backends.stablehlo_walk import Visit

Break = tuple[str, str]
Check = Callable[[Visit, str], Iterator[Break]]
"""(visit, generation) -> (rule, what is wrong), for every rule that is broken."""

TOP_K_CALLS = ("mhlo.topk", "TopK")
_KNOWN = frozenset(
    """
    abs add all_gather all_reduce all_to_all and atan2 bitcast_convert broadcast_in_dim cbrt ceil clamp collective_broadcast
    collective_permute compare concatenate constant convert cosine divide exponential exponential_minus_one floor get_tuple_element
    iota is_finite log log_plus_one logistic maximum minimum multiply negate not or optimization_barrier pad partition_id popcnt power
    remainder replica_id reshape return reverse round_nearest_afz round_nearest_even rsqrt select shift_left shift_right_logical sign
    sine slice sqrt subtract tan tanh transpose tuple xor complex real imag
    """.split()  # noqa: SIM905 - as many lines as words otherwise
)
_KNOWN_ELSEWHERE = frozenset(
    {
        *(f"chlo.{name}" for name in ("top_k", "erf", "erf_inv", "erfc", "square")),
        *(f"func.{name}" for name in ("call", "return")),
        *(f"sdy.{name}" for name in ("manual_computation", "return", "sharding_constraint", "mesh")),
    }
)


def breaks(visit: Visit, generation: str) -> Iterator[Break]:
    """Every rule that this operation breaks."""
    yield from _types(visit, generation)
    check = _CHECKS.get(visit.name)
    if check is not None:
        yield from check(visit, generation)
    elif visit.name.removeprefix("stablehlo.") not in _KNOWN and visit.name not in _KNOWN_ELSEWHERE:
        yield "unlisted-op", f"{visit.name} is not listed"


def _operands(visit: Visit) -> list[Tensor]:
    return [tensor(value) for value in visit.op.operation.operands]


def _results(visit: Visit) -> list[Tensor]:
    return [tensor(value) for value in visit.op.operation.results]


def _types(visit: Visit, generation: str) -> Iterator[Break]:
    # What is returned was found where it was made.
    kinds = () if visit.name.endswith(".return") else (*_operands(visit), *_results(visit))
    for kind in dict.fromkeys(kinds):
        if -1 in kind.shape:
            yield "dynamic-shape", f"{kind} has a dimension that is not static"
        if kind.element == "f64":
            yield "float64", f"{kind} is of 64-bit floats"
        if kind.element in ("i64", "ui64"):
            yield "int64", f"{kind} is of 64-bit integers"
        if kind.element.startswith("complex"):
            yield "complex", f"{kind} is complex"
        if kind.element.upper() == "F8E4M3FN" and generation in ("v2", "v3"):
            yield "fp8-e4m3fn", f"{kind} on {generation}"


def _conditional(visit: Visit, generation: str) -> Iterator[Break]:
    yield "conditional", f"{visit.name} chooses what to run"


def _while(visit: Visit, generation: str) -> Iterator[Break]:
    if visit.trips is None:
        yield "dynamic-loop", "neither its first count, its limit nor its step may be computed by the program"


def _host(visit: Visit, generation: str) -> Iterator[Break]:
    yield "host-callback", f"{visit.name} waits for the host"


def _custom_call(visit: Visit, generation: str) -> Iterator[Break]:
    target = (attribute(visit.op, "call_target_name") or "").strip('"')
    if "callback" in target:
        yield "host-callback", f"it calls {target}"
    elif target in TOP_K_CALLS:
        yield from _top_k(visit, generation)
    elif target not in CALLEES:
        yield "custom-call", f"it calls {target or 'something without a name'}"


def _top_k(visit: Visit, generation: str) -> Iterator[Break]:
    source, k = _operands(visit)[0], _results(visit)[0].shape[-1]
    if k > HARD_MAX_TOP_K:
        yield "large-top-k", f"k = {k} of {source}, and above {HARD_MAX_TOP_K} the compiler refuses"
    elif k > MAX_TOP_K:
        yield "large-top-k", f"k = {k} of {source}"
    if source.is_integer:
        yield "integer-top-k", f"the operand is {source}"


def _dot(visit: Visit, generation: str) -> Iterator[Break]:
    yield from _product(visit, generation)
    right = _operands(visit)[1]
    contracted = field(visit.op, "dot_dimension_numbers", "rhs_contracting_dimensions")
    if len(right.shape) == 2 and contracted == (1,) and right.size >= LARGE_WEIGHT:
        yield "transposed-weight", f"{right} is contracted over its axis 1"


def _product(visit: Visit, generation: str) -> Iterator[Break]:
    operands = _operands(visit)
    if any(kind.is_integer or kind.element == "i1" for kind in operands):
        yield "integer-dot", f"{visit.name} of {' and '.join(map(str, operands))}"


def _reduce(visit: Visit, generation: str) -> Iterator[Break]:
    operands = _operands(visit)
    if len(operands) > 2:
        yield "variadic-reduce", f"it reduces {', '.join(map(str, operands[: len(operands) // 2]))} together"


def _sort(visit: Visit, generation: str) -> Iterator[Break]:
    yield "sort", f"it sorts {', '.join(map(str, _operands(visit)))}"


def _rng(visit: Visit, generation: str) -> Iterator[Break]:
    algorithm = attribute(visit.op, "rng_algorithm") or "stablehlo.rng"
    if "DEFAULT" not in algorithm:
        yield "random-bits", f"by {algorithm.removeprefix('#stablehlo<').removesuffix('>')}"


def _reduce_precision(visit: Visit, generation: str) -> Iterator[Break]:
    yield "reduce-precision", f"of {_operands(visit)[0]}"


def _right_shift(visit: Visit, generation: str) -> Iterator[Break]:
    kind = _operands(visit)[0]
    if kind.element not in ("i32", "ui32"):
        yield "narrow-right-shift", f"of {kind}"


def _arithmetic(visit: Visit, generation: str) -> Iterator[Break]:
    (kind,) = _results(visit)
    if not kind.is_integer or visit.times == 0:
        return
    for value, fact in zip(_operands(visit), visit.facts, strict=True):
        if fact is not None and fact.is_constant and not fact.within(-EXACT_INTEGERS, EXACT_INTEGERS):
            yield "inexact-integers", f"{visit.name} of {value} and the constant {int(fact.low)}"
            return
    # Where the program does not bound an operand nothing can be seen of the sum: values from memory are the host's to keep small.
    if any(_is_open(fact, value) for value, fact in zip(_operands(visit), visit.facts, strict=True)):
        return
    if _may_be_inexact(raw_sum_or_product(visit.op, visit.name, visit.facts)):
        yield "inexact-integers", f"{visit.name} may give numbers beyond 2^24 in {kind}"


def _is_open(fact: Fact, kind: Tensor) -> bool:
    bounds = whole(kind)
    return fact is None or bounds is None or fact.low == bounds.low or fact.high == bounds.high


def _may_be_inexact(fact: Fact) -> bool:
    return fact is not None and not fact.within(-EXACT_INTEGERS, EXACT_INTEGERS)


def _all_reduce(visit: Visit, generation: str) -> Iterator[Break]:
    for kind, fact in zip(_operands(visit), visit.facts, strict=True):
        if kind.is_integer and _may_be_inexact(fact):
            yield "inexact-integers", f"{visit.name} of {kind}, which is not provably below 2^24"


def _gather(visit: Visit, generation: str) -> Iterator[Break]:
    source, indices = _operands(visit)
    axes = field(visit.op, "dimension_numbers", "start_index_map")
    sizes = numbers(visit.op, "slice_sizes")
    (vector_axis,) = field(visit.op, "dimension_numbers", "index_vector_dim") or (0,)
    limits = [(axis, source.shape[axis] - sizes[axis]) for axis in axes]
    yield from _indices(visit, source, _columns(visit, 1, indices, vector_axis, len(axes)), limits)
    yield from _index_space(source, axes)


def _scatter(visit: Visit, generation: str) -> Iterator[Break]:
    count = len(_results(visit))
    source, indices, updates = (_operands(visit)[idx] for idx in (0, count, count + 1))
    numbered = "scatter_dimension_numbers"
    axes = field(visit.op, numbered, "scatter_dims_to_operand_dims")
    (vector_axis,) = field(visit.op, numbered, "index_vector_dim") or (0,)
    left_out = {
        *field(visit.op, numbered, "inserted_window_dims"),
        *field(visit.op, numbered, "input_batching_dims"),
    }
    window = [axis for axis in range(len(source.shape)) if axis not in left_out]
    widths = dict(zip(window, field(visit.op, numbered, "update_window_dims"), strict=True))
    limits = [(axis, source.shape[axis] - (updates.shape[widths[axis]] if axis in widths else 1)) for axis in axes]
    yield from _indices(visit, source, _columns(visit, count, indices, vector_axis, len(axes)), limits)
    yield from _index_space(source, axes)
    if not is_overwriting(visit.op):
        if source.is_integer or source.element == "i1":
            yield "integer-scatter-reduce", f"into {source}"
        return
    values = visit.facts[count + 1]
    if source.is_integer and values != whole(updates) and _may_be_inexact(values):
        yield "inexact-integers", f"values scattered into {source} may be beyond 2^24"


def _columns(visit: Visit, operand: int, indices: Tensor, vector_axis: int, count: int) -> list[Fact]:
    """What is known of the index into each axis: of each column, where they were put side by side just before."""
    value = visit.op.operation.operands[operand]
    owner = getattr(value.owner, "operation", value.owner)
    is_joined = getattr(owner, "name", "") == "stablehlo.concatenate"
    if is_joined and numbers(owner, "dimension") == (vector_axis,):
        parts = [(visit.fact_of(part), tensor(part).shape[vector_axis]) for part in owner.operands]
        return [fact for fact, width in parts for _ in range(width)]
    return [visit.facts[operand]] * count


def _dynamic_slice(visit: Visit, generation: str) -> Iterator[Break]:
    (source, *_), sizes = _operands(visit), numbers(visit.op, "slice_sizes")
    limits = [(axis, dim - size) for axis, (dim, size) in enumerate(zip(source.shape, sizes, strict=True))]
    yield from _indices(visit, source, list(visit.facts[1:]), limits)


def _dynamic_update_slice(visit: Visit, generation: str) -> Iterator[Break]:
    source, update, *_ = _operands(visit)
    limits = [(axis, dim - size) for axis, (dim, size) in enumerate(zip(source.shape, update.shape, strict=True))]
    yield from _indices(visit, source, list(visit.facts[2:]), limits)


def _indices(visit: Visit, source: Tensor, facts: list[Fact], limits: list[tuple[int, int]]) -> Iterator[Break]:
    if 0 in source.shape or any(0 in kind.shape for kind in _results(visit)):
        return  # nothing is read or written
    for fact, (axis, limit) in zip(facts, limits, strict=True):
        if fact is None or not fact.within(0, limit):
            known = "anything" if fact is None else f"{int(fact.low)} to {int(fact.high)}"
            yield (
                "unclipped-index",
                f"the index into axis {axis} of {source} may be {known}, and 0 to {limit} are there",
            )


def _index_space(source: Tensor, axes: tuple[int, ...]) -> Iterator[Break]:
    places = math.prod(source.shape[axis] for axis in axes)
    if places > EXACT_INTEGERS:
        yield "large-index-space", f"{places} places of {source} are indexed"


_CHECKS: dict[str, Check] = {
    "stablehlo.if": _conditional,
    "stablehlo.case": _conditional,
    "stablehlo.while": _while,
    "stablehlo.custom_call": _custom_call,
    "chlo.top_k": _top_k,
    "stablehlo.dot_general": _dot,
    "stablehlo.convolution": _product,
    "chlo.ragged_dot": _product,
    "stablehlo.reduce": _reduce,
    "stablehlo.reduce_window": _reduce,
    "stablehlo.sort": _sort,
    "stablehlo.rng": _rng,
    "stablehlo.rng_bit_generator": _rng,
    "stablehlo.reduce_precision": _reduce_precision,
    "stablehlo.shift_right_arithmetic": _right_shift,
    "stablehlo.all_reduce": _all_reduce,
    "stablehlo.reduce_scatter": _all_reduce,
    "stablehlo.gather": _gather,
    "stablehlo.scatter": _scatter,
    "stablehlo.dynamic_slice": _dynamic_slice,
    "stablehlo.dynamic_update_slice": _dynamic_update_slice,
    **dict.fromkeys(("stablehlo.add", "stablehlo.subtract", "stablehlo.multiply"), _arithmetic),
    **dict.fromkeys(("stablehlo.infeed", "stablehlo.outfeed", "stablehlo.send", "stablehlo.recv"), _host),
}
