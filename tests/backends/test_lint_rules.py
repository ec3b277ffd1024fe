"""Every rule of the linter for Neuron: an illegal program that it finds, at its line, and a legal twin that it leaves alone."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from quire.backends import neuron_rules
from quire.backends.neuron_rules import RULES, Severity
from quire.backends.stablehlo_lint import Finding, lint
from quire.kernels.errors import InvalidConfigError

FLOATS = jax.ShapeDtypeStruct((8, 16), jnp.float32)
INTS = jax.ShapeDtypeStruct((8, 16), jnp.int32)
ROW = jax.ShapeDtypeStruct((8,), jnp.int32)
NUMBER = jax.ShapeDtypeStruct((), jnp.int32)
WEIGHT = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16)
MARK = "# illegal"


@dataclass(frozen=True)
class Pair:
    """`wrong` breaks the rule in the line that ends in MARK, `right` does what it can do instead."""

    rule: str
    wrong: Callable[..., Any]
    right: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    generation: str = "v2"
    x64: bool = False

    def __str__(self) -> str:
        return f"{self.rule}-{self.wrong.__name__}"


PAIRS: list[Pair] = []


def pair(rule: str, *arguments: jax.ShapeDtypeStruct, right: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Enters the decorated function as the illegal one."""

    def enter(wrong: Callable[..., Any]) -> Callable[..., Any]:
        PAIRS.append(Pair(rule, wrong, right, arguments, **options))
        return wrong

    return enter


# Control flow and the host


@pair("conditional", FLOATS, right=lambda x: jnp.where(x[0, 0] > 0, x, -x))
def branch(x):
    return jax.lax.cond(x[0, 0] > 0, lambda: x, lambda: -x)  # illegal


@pair("conditional", FLOATS, NUMBER, right=lambda x, i: jnp.where(i == 0, x, jnp.where(i == 1, -x, x + 1)))
def switch(x, i):
    return jax.lax.switch(i, [lambda: x, lambda: -x, lambda: x + 1])  # illegal


@pair("dynamic-loop", FLOATS, NUMBER, right=lambda x, n: jax.lax.fori_loop(0, 5, lambda _, c: c * 2, x))
def limit_from_an_argument(x, n):
    return jax.lax.fori_loop(0, n, lambda _, c: c * 2, x)  # illegal


@pair("dynamic-loop", FLOATS, right=lambda x: jax.lax.scan(lambda c, row: (c + row, c), x[0], x))
def until_large_enough(x):
    return jax.lax.while_loop(lambda c: c[0, 0] < 3, lambda c: c * 2, x)  # illegal


@pair("host-callback", FLOATS, right=lambda x: x + 1)
def callback(x):
    return jax.pure_callback(lambda v: v, x, x)  # illegal


@pair("host-callback", FLOATS, right=lambda x: x + 1)
def debug_print(x):
    jax.debug.print("{}", x[0, 0])  # illegal
    return x


@pair("custom-call", FLOATS, right=jnp.abs)
def someone_elses_kernel(x):
    return jax.ffi.ffi_call("not_of_neuron", x)(x)  # illegal


# Types


@pair("float64", FLOATS, right=lambda x: x.astype(jnp.float32), x64=True)
def doubles(x):
    return x.astype(jnp.float64)  # illegal


@pair("int64", INTS, right=lambda x: x.astype(jnp.int32), x64=True)
def longs(x):
    return x.astype(jnp.int64)  # illegal


@pair("complex", FLOATS, right=lambda x: x)
def imaginary(x):
    return jax.lax.complex(x, x)  # illegal


@pair("fp8-e4m3fn", FLOATS, right=lambda x: x.astype(jnp.float8_e5m2))
@pair("fp8-e4m3fn", FLOATS, right=lambda x: x.astype(jnp.float8_e4m3), generation="v3")
def eight_bits(x):
    return x.astype(jnp.float8_e4m3fn)  # illegal


# Products, reductions, orders


@pair("integer-dot", INTS, right=lambda x: x.astype(jnp.float32) @ x.astype(jnp.float32).T)
def integers(x):
    return x @ x.T  # illegal


@pair("integer-dot", FLOATS, right=lambda x: x.astype(jnp.bfloat16) @ x.astype(jnp.bfloat16).T)
def small_integers(x):
    x = x.astype(jnp.int8)
    return jnp.matmul(x, x.T, preferred_element_type=jnp.int32)  # illegal


@pair("integer-dot", FLOATS, right=lambda x: jax.lax.conv(x[None, None], x[None, None, :3, :3], (1, 1), "SAME"))
def convolution_of_integers(x):
    x = x.astype(jnp.int32)[None, None]
    return jax.lax.conv(x, x[:, :, :3, :3], (1, 1), "SAME")  # illegal


@pair("variadic-reduce", FLOATS, right=lambda x: jnp.max(x, axis=1))
def index_of_the_largest(x):
    return jnp.argmax(x, axis=1)  # illegal


@pair("sort", FLOATS, right=lambda x: jax.lax.top_k(x, 4)[0])
def whole_sort(x):
    return jnp.sort(x, axis=1)  # illegal


@pair("large-top-k", WEIGHT, right=lambda x: jax.lax.top_k(x, 256))
def long_top_k(x):
    return jax.lax.top_k(x, 257)  # illegal


@pair("integer-top-k", INTS, right=lambda x: jax.lax.top_k(x.astype(jnp.float32), 2))
def top_integers(x):
    return jax.lax.top_k(x, 2)  # illegal


@pair("random-bits", right=lambda: jnp.ones(4))
def three_fry(x=None):
    key = jnp.zeros(4, jnp.uint32)
    return jax.lax.rng_bit_generator(key, (4,), jnp.uint32, algorithm=jax.lax.RandomAlgorithm.RNG_THREE_FRY)  # illegal


@pair(
    "random-bits",
    right=lambda: jax.lax.rng_bit_generator(
        jnp.zeros(4, jnp.uint32), (4,), jnp.uint32, algorithm=jax.lax.RandomAlgorithm.RNG_DEFAULT
    ),
)
def uniform():
    return jax.lax.rng_uniform(0.0, 1.0, (4,))  # illegal


@pair("reduce-precision", FLOATS, right=lambda x: x.astype(jnp.bfloat16).astype(jnp.float32))
def rounded(x):
    return jax.lax.reduce_precision(x, 8, 7)  # illegal


@pair("narrow-right-shift", INTS, right=lambda x: x >> 3)
def shifted_bytes(x):
    return x.astype(jnp.int8) >> 3  # illegal


# Integers that pass through float32


@pair("integer-scatter-reduce", INTS, right=lambda x: x.astype(jnp.float32).at[jnp.arange(8), 0].add(1.0))
def counted(x):
    return x.at[jnp.arange(8), 0].add(1)  # illegal


@pair("integer-scatter-reduce", INTS, right=lambda x: x.at[jnp.arange(8), 0].set(1))
def marked(x):
    return (x > 0).at[jnp.arange(8), 0].max(True)  # illegal


@pair("inexact-integers", INTS, right=lambda x: x + 2**24)
def large_constant(x):
    return x + (2**24 + 1)  # illegal


@pair("inexact-integers", right=lambda: jnp.arange(4096)[:, None] * 4096 + jnp.arange(4096)[None, :])
def large_iota():
    rows = jnp.arange(4097)[:, None]
    return rows * 8192  # illegal


@pair("inexact-integers", INTS, right=lambda x: x.at[0].set(jnp.clip(x[1], 0, 2**24)))
def scattered_large_ones(x):
    return x.at[jnp.arange(2), 0].set(2**24 + 1)  # illegal


def over_two_devices(function: Callable[..., Any]) -> Callable[..., Any]:
    mesh, everywhere = AbstractMesh((2,), ("model",)), PartitionSpec()
    return jax.shard_map(function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)


@pair("inexact-integers", INTS, right=over_two_devices(lambda x: jax.lax.psum(jnp.clip(x, 0, 100), "model")))
def summed_over_devices(x):
    return over_two_devices(lambda x: jax.lax.psum(x, "model"))(x)  # illegal


# Indices


@pair("unclipped-index", FLOATS, ROW, right=lambda x, i: x[jnp.clip(i, 0, 7)])
def gathered(x, i):
    return x[i]  # illegal


@pair("unclipped-index", FLOATS, ROW, right=lambda x, i: x.at[jnp.clip(i, 0, 7)].get(mode="promise_in_bounds"))
def promised(x, i):
    return x.at[i].get(mode="promise_in_bounds")  # illegal


@pair("unclipped-index", FLOATS, ROW, right=lambda x, i: x[jnp.clip(i, 0, 7), jnp.arange(8)])
def clipped_for_the_wrong_axis(x, i):
    return x[jnp.clip(i, 0, 8), jnp.arange(8)]  # illegal


@pair("unclipped-index", FLOATS, ROW, right=lambda x, i: x.at[jax.lax.rem(jnp.maximum(i, 0), 8)].set(1.0))
def written(x, i):
    return x.at[i].set(1.0)  # illegal


@pair("unclipped-index", FLOATS, NUMBER, right=lambda x, i: jax.lax.dynamic_slice_in_dim(x, jnp.clip(i, 0, 6), 2))
def sliced(x, i):
    return jax.lax.dynamic_slice_in_dim(x, jnp.clip(i, 0, 7), 2)  # illegal


@pair(
    "unclipped-index",
    FLOATS,
    NUMBER,
    right=lambda x, i: jax.lax.dynamic_update_index_in_dim(x, x[0], jnp.bitwise_and(i, 7), 0),
)
def updated(x, i):
    return jax.lax.dynamic_update_index_in_dim(x, x[0], i, 0)  # illegal


@pair(
    "unclipped-index",
    FLOATS,
    NUMBER,
    right=lambda x, i: jax.lax.fori_loop(0, 8, lambda j, c: c + jax.lax.dynamic_index_in_dim(x, j, 0), x[:1]),
)
def counted_too_far(x, i):
    return jax.lax.fori_loop(0, 9, lambda j, c: c + jax.lax.dynamic_index_in_dim(x, j, 0), x[:1])  # illegal


HUGE = jax.ShapeDtypeStruct((4096, 4098), jnp.float32)


@pair("large-index-space", HUGE, ROW, right=lambda x, i: x[jnp.clip(i, 0, 4095)])
def flat_places(x, i):
    i = jnp.clip(i, 0, 4095)
    return x[i, i]  # illegal


# Time and size


@pair("transposed-weight", WEIGHT, WEIGHT, right=lambda x, w: jnp.einsum("td,dv->tv", x, w))
def tied(x, w):
    return jnp.einsum("td,vd->tv", x, w)  # illegal


@pair("unlisted-op", FLOATS, right=jax.lax.erf)
def rare_function(x):
    return jax.lax.lgamma(x)  # illegal


@pair("too-many-instructions", HUGE, right=lambda x: jax.lax.fori_loop(0, 10, lambda _, c: jnp.tanh(c), x))
def long_loop(x):
    return jax.lax.fori_loop(0, 100_000, lambda _, c: jnp.tanh(c), x)


def lowered(function: Callable[..., Any], arguments: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cpu",))


def found(pair: Pair, function: Callable[..., Any]) -> list[Finding]:
    # The lambdas' promotions of Python numbers are jax's own; what is tested is what they are lowered to.
    with jax.enable_x64(pair.x64) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(pair.x64):
        report = lint(lowered(function, pair.arguments), generation=pair.generation)
    return [finding for finding in report.findings if finding.rule.name == pair.rule]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_what_breaks_a_rule_is_found_at_its_line(pair: Pair) -> None:
    findings = found(pair, pair.wrong)
    assert findings, "nothing found"
    lines, first = inspect.getsourcelines(pair.wrong)
    marked = [first + idx for idx, line in enumerate(lines) if line.rstrip().endswith(MARK)]
    for finding in findings:
        assert pair.rule in finding.describe()
        assert finding.rule.remedy in finding.describe()
        if marked:
            assert (Path(finding.place.file).name, finding.place.line) == (Path(__file__).name, marked[0])
            assert finding.place.function.startswith(pair.wrong.__name__)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_its_legal_twin_is_left_alone(pair: Pair) -> None:
    assert [finding.describe() for finding in found(pair, pair.right)] == []


def test_every_rule_has_a_pair() -> None:
    # A program of no static shape cannot be lowered by jit; see below.
    assert {pair.rule for pair in PAIRS} | {"dynamic-shape"} == set(RULES)


def test_a_dynamic_shape_is_found() -> None:
    program = """
    module {
      func.func public @main(%arg0: tensor<?xf32>) -> tensor<?xf32> {
        %0 = stablehlo.abs %arg0 : tensor<?xf32>
        return %0 : tensor<?xf32>
      }
    }"""
    assert {finding.rule.name for finding in lint(program).errors} == {"dynamic-shape"}
    assert lint(program.replace("?", "4")).errors == ()


@pytest.mark.parametrize("target", sorted(neuron_rules.CALLEES))
def test_calls_that_the_compiler_resolves_are_left_alone(target: str) -> None:
    program = f"""
    module {{
      func.func public @main(%arg0: tensor<4xf32>) -> tensor<4xf32> {{
        %0 = stablehlo.custom_call @{target}(%arg0) : (tensor<4xf32>) -> tensor<4xf32>
        return %0 : tensor<4xf32>
      }}
    }}"""
    assert lint(program).findings == ()
    assert [finding.rule.name for finding in lint(program.replace(target, f"{target}2")).errors] == ["custom-call"]


def test_a_loop_whose_index_moves_by_more_than_one_is_followed() -> None:
    """Both ways to carry an index: the loop's own counter, and one beside it, moved in a function that the body calls."""
    step = jax.jit(lambda i: i + 3)

    def program(x, last):
        def body(_, carried):
            i, total = carried
            return step(i), total + jax.lax.dynamic_index_in_dim(x, i, 0)

        return jax.lax.fori_loop(0, last, body, (jnp.int32(1), x[:1]))

    assert lint(lowered(partial(program, last=3), (FLOATS,))).errors == ()
    (finding,) = lint(lowered(partial(program, last=4), (FLOATS,))).errors
    assert "1 to 10" in finding.detail


def test_fp8_of_the_ieee_kind_is_for_v2_and_v3_and_the_other_for_v4() -> None:
    program = lowered(eight_bits, (FLOATS,))
    assert {g: bool(lint(program, generation=g).errors) for g in neuron_rules.GENERATIONS} == {
        "v2": True,
        "v3": True,
        "v4": False,
    }


def test_a_generation_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidConfigError, match="generation='v1' is no NeuronCore; there are: v2, v3, v4"):
        lint(lowered(jnp.abs, (FLOATS,)), generation="v1")


def test_text_and_module_give_what_the_lowered_program_gives() -> None:
    program = lowered(gathered, (FLOATS, ROW))
    expected = lint(program)
    module = program.compiler_ir("stablehlo")
    assert lint(module) == expected
    text = lint(program.as_text())
    assert [finding.rule for finding in text.findings] == [finding.rule for finding in expected.findings]
    assert text.instructions == expected.instructions


def test_a_report_tells_errors_from_warnings_and_names_the_size() -> None:
    def program(x, w, i):
        return x[i] @ w.T

    report = lint(lowered(program, (WEIGHT, WEIGHT, ROW)))
    assert [finding.rule.severity for finding in report.errors] == [Severity.ERROR]
    text = report.describe()
    assert text.index("unclipped-index") < text.index("instructions")
    assert "0 to 1023 are there" in text
    assert f"about {report.instructions:,} instructions" in text


def test_a_loop_counts_as_often_as_it_runs() -> None:
    def instructions(trips: int) -> int:
        return lint(
            lowered(lambda x: jax.lax.fori_loop(0, trips, lambda _, c: jnp.tanh(c @ c), x), (WEIGHT,))
        ).instructions

    once = lint(lowered(lambda x: jnp.tanh(x @ x), (WEIGHT,))).instructions
    assert once == 8 * 8 * 2 + 4, "tiles of the product, tiles of the tanh"
    in_a_trip = instructions(2) - instructions(1)
    assert once < in_a_trip < once + 4, "and the loop's counter"
    assert instructions(11) == 11 * in_a_trip


def test_a_product_counts_its_tiles() -> None:
    """1024 x 1024 x 1024: 8 tiles of depth, 8 of stationary columns, 2 of moving ones."""
    assert lint(lowered(jnp.matmul, (WEIGHT, WEIGHT))).instructions == 8 * 8 * 2


def test_a_gather_counts_a_descriptor_for_each_slice() -> None:
    def instructions(count: int) -> int:
        rows = jax.ShapeDtypeStruct((count,), jnp.int32)
        return lint(
            lowered(lambda x, i: x.at[jnp.clip(i, 0, 7)].get(mode="promise_in_bounds"), (WEIGHT, rows))
        ).instructions

    assert instructions(103) - instructions(3) == 100


def test_a_call_is_looked_into_with_what_is_known_there() -> None:
    """The same function, called with an index that is clipped and with one that is not."""
    inner = jax.jit(lambda x, i: x.at[i].get(mode="promise_in_bounds"))

    def good(x, i):
        return inner(x, jnp.clip(i, 0, 7))

    def bad(x, i):
        return inner(x, jnp.clip(i, 0, 7)) + inner(x, jnp.clip(i, 0, 8))

    assert lint(lowered(good, (FLOATS, ROW))).errors == ()
    (finding,) = lint(lowered(bad, (FLOATS, ROW))).errors
    assert "0 to 8" in finding.detail


def test_what_a_loop_changes_is_not_known_in_it() -> None:
    """The carried index begins within bounds and leaves them."""

    def program(x):
        def body(i, _):
            return i + 1, jax.lax.dynamic_index_in_dim(x, i, 0)

        return jax.lax.scan(body, jnp.int32(0), length=20)

    assert {finding.rule.name for finding in lint(lowered(program, (FLOATS,))).errors} == {"unclipped-index"}


def exhaustive(function: Callable[..., Any], low: int, high: int) -> None:
    """Every value of `function` over all pairs of operands lies within what is found of it."""
    from quire.backends.stablehlo_walk import Visit, Walker

    ranges: list[Any] = []

    def program(a, b):
        return function(jnp.clip(a, low, high), jnp.clip(b, low, high))

    def visit(visit: Visit) -> None:
        if visit.name == "func.return":
            ranges.append(visit.facts[0])

    Walker(lowered(program, (ROW, ROW)).compiler_ir("stablehlo"), visit).run()
    a, b = np.meshgrid(np.arange(low, high + 1, dtype=np.int32), np.arange(low, high + 1, dtype=np.int32))
    values = np.asarray(function(jnp.asarray(a.ravel()), jnp.asarray(b.ravel()))).astype(int)
    assert ranges[-1].low <= values.min(), function
    assert values.max() <= ranges[-1].high, function


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": jnp.add,
    "subtract": jnp.subtract,
    "multiply": jnp.multiply,
    "divide": lambda a, b: jax.lax.div(a, jnp.maximum(b, 1)),
    "floor divide": lambda a, b: a // jnp.int32(3),
    "remainder": lambda a, b: jax.lax.rem(a, jnp.maximum(b, 1)),
    "modulo": lambda a, b: a % jnp.int32(3),
    "and": jnp.bitwise_and,
    "or": jnp.bitwise_or,
    "xor": jnp.bitwise_xor,
    "shift": lambda a, b: jax.lax.shift_right_arithmetic(a, jnp.clip(b, 0, 3)),
    "logical shift": lambda a, b: jax.lax.shift_right_logical(a, jnp.clip(b, 0, 3)),
    "negate": lambda a, b: -a,
    "absolute": lambda a, b: jnp.abs(a),
    "sign": lambda a, b: jnp.sign(a),
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "clamp": lambda a, b: jax.lax.clamp(jnp.int32(-1), a, jnp.int32(2)),
    "select": lambda a, b: jnp.where(a < b, a, b + 1),
    "less": lambda a, b: (a < b).astype(jnp.int32),
    "not": lambda a, b: (~(a == b)).astype(jnp.int32),
    "unsigned": lambda a, b: jnp.minimum(jax.lax.bitcast_convert_type(a, jnp.uint32), jnp.uint32(9)).astype(jnp.int32),
    "narrowed": lambda a, b: (a * 100).astype(jnp.int8).astype(jnp.int32),
    "through floats": lambda a, b: jnp.minimum(a.astype(jnp.float32), jnp.float32(2.5)).astype(jnp.int32),
}


@pytest.mark.parametrize("bounds", [(-5, 7), (0, 6), (-6, -1), (2, 2)], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_range_holds_every_value(operation: str, bounds: tuple[int, int]) -> None:
    exhaustive(OPERATIONS[operation], *bounds)


@pytest.mark.parametrize("reduce", [jnp.min, jnp.max, partial(jnp.sum, dtype=jnp.int32)], ids=["min", "max", "sum"])
def test_a_range_holds_every_reduction(reduce: Callable[..., Any]) -> None:
    exhaustive(lambda a, b: reduce(jnp.stack([a, b, a]), axis=0), -3, 4)
