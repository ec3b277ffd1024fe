"""Which kernels run is chosen at start and said with the reasons: without the libraries, with broken ones, by name."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest

from quire.kernels.errors import KernelUnavailableError
from quire.kernels.native import library
from quire.kernels.ops import COMPOSED, OPS, REFERENCE, choose_ops
from tests.kernels.native import CONTEXT, needs

NATIVE_OPS = tuple(op.name for op in OPS if any(name.name.startswith("native_") for name in op.implementations))
EVERY_FLAG = frozenset().union(*library.INSTRUCTION_SETS.values())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, in which the libraries are looked for, by a process that has loaded none."""
    monkeypatch.setattr(library, "library_path", lambda name: tmp_path / f"quire_cpu_{name}.so")
    monkeypatch.setattr(library, "load_library", functools.cache(library.Library))
    return tmp_path


def test_without_libraries_the_reference_serves_and_says_how_to_get_them(folder: Path) -> None:
    ops = choose_ops(replace(CONTEXT, instruction_sets=EVERY_FLAG))
    assert {name: getattr(ops, name).name for name in NATIVE_OPS} == {
        name: COMPOSED if name in ("decoder_layer", "head_entries") else REFERENCE for name in NATIVE_OPS
    }
    assert ops.fused_layer is None
    assert ops.fused_head_entries is None
    for name in NATIVE_OPS:
        passed_over = {kind for kind, _ in getattr(ops, name).passed_over if kind.startswith("native_")}
        assert passed_over == {f"native_{kind}" for kind in library.INSTRUCTION_SETS}
    for line in ops.describe().splitlines():
        if line.split(":")[0] in NATIVE_OPS:
            for kind in library.INSTRUCTION_SETS:
                assert f"native_{kind}: not built: install quire again where a C++17 compiler" in line


@pytest.mark.parametrize("op", NATIVE_OPS)
def test_a_wanted_kernel_that_is_not_built_is_an_error(folder: Path, op: str) -> None:
    with pytest.raises(KernelUnavailableError, match="native_portable: not built: install quire again"):
        choose_ops(CONTEXT, {op: "native_portable"})


def test_a_library_that_cannot_be_loaded_is_passed_over_in_the_loaders_words(folder: Path) -> None:
    (folder / "quire_cpu_portable.so").write_text("This is no library.\n")
    ops = choose_ops(replace(CONTEXT, instruction_sets=frozenset()))
    assert ops.linear.name == REFERENCE
    reason = dict(ops.linear.passed_over)["native_portable"]
    # What dlopen says names the file; how it goes on is the loader's affair.
    assert reason.startswith("quire_cpu_portable.so cannot be loaded: ")
    assert str(folder / "quire_cpu_portable.so") in reason
    with pytest.raises(KernelUnavailableError, match=r"cannot be loaded: .*Install quire again"):
        choose_ops(CONTEXT, {"linear": "native_portable"})


@pytest.mark.parametrize("name", library.INSTRUCTION_SETS)
def test_a_processor_that_lacks_a_flag_is_told_which(name: str) -> None:
    for flag in library.INSTRUCTION_SETS[name]:
        reason = library.refuses(name, replace(CONTEXT, instruction_sets=EVERY_FLAG - {flag}))
        assert reason == f"the processor lacks {flag}"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"platform": "tpu"}, "needs a CPU"),
        ({"dtype": "float16"}, "float16 is not one of float32, bfloat16"),
        ({"scan_layers": True}, "layers are scanned"),
        ({"num_devices": 2}, "several devices share the model"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"head_dim": 514}, "head_dim 514 is odd or above 512"),
    ],
)
def test_what_the_kernels_cannot_do_they_refuse(tmp_path, monkeypatch, change: dict, reason: str) -> None:
    (tmp_path / "quire_cpu_portable.so").touch()
    monkeypatch.setattr(library, "library_path", lambda name: tmp_path / f"quire_cpu_{name}.so")
    assert reason in library.refuses("portable", replace(CONTEXT, **change))


@needs("portable")
def test_a_native_layer_without_native_products_is_an_error() -> None:
    """Its weights are packed by the linear op."""
    with pytest.raises(KernelUnavailableError, match="needs a native linear too, not reference"):
        choose_ops(CONTEXT, {"decoder_layer": "native_portable", "linear": REFERENCE})
    assert choose_ops(CONTEXT, {"linear": REFERENCE}).decoder_layer.name == COMPOSED
