"""What is read out of the TPU compiler's listings, and one kernel on its way through the compiler."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from quire.backends.chips import chips
from quire.bench import kernels
from quire.bench.kernels import (
    DECODE,
    OURS,
    PAGED,
    RAGGED,
    Code,
    Loop,
    compare,
    figures,
    loops_of,
    read_code,
    table,
    units_of,
)
from quire.server.cli import main

LISTING = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sadd.s32 1, %s1  ;;  %s3 = sphi %s1, %s2 }
   0x2   : > { %v1 = vld [vmem:%s2] }
   0x3 LB: >> { %v2 = vmatmul.bf16.gmra.mxu0 %v1  ;;  %v3 = vmatmul.bf16.gmra.mxu1 %v1 }
   0x4   :  {}
   0x5 LB: >>> { %s4 = sadd.s32 1, %s3 }
   0x6   : >> { %v4 = vpop.f32.mrf.mxu0 }
   0x7 PF: > { %s5 = smov 1 }
   0x8 LB: >> { %v5 = vmatmul.bf16.gmra.mxu0 %v1 }
   0x9   : > { %p1 = scmp.ge.s32.totalorder %s2, 4 }
   0xa   :  { %s6 = smov 2 }
"""
UNITS = """\
== CAPACTIY:
MXU, XLU, VALU, SALU
    4     3     4     2
== UTILIZATION:
""" + "".join(
    f"{row}\n"
    for row in (
        "0 0 0 1",
        "0 0 0 2",
        "0 0 1 0",
        "2 0 0 0",
        "0 0 0 0",
        "0 0 0 1",
        "2 0 4 0",
        "0 0 0 1",
        "1 0 0 0",
        "0 0 0 1",
    )
)


def test_loops_are_told_apart_by_where_they_begin_and_how_deep_they_are() -> None:
    assert loops_of(LISTING) == [Loop(1, 10, 1, 3), Loop(3, 7, 2, 2), Loop(5, 6, 3, 0), Loop(8, 9, 2, 1)]


def test_the_kernel_is_found_among_what_was_dumped(tmp_path: Path) -> None:
    (tmp_path / "1-pad.0-03-final_bundles.txt").write_text("     0   :  { %s1 = smov 0 }\n")
    (tmp_path / "2-kernel.1-02-schedule-analysis_final_bundles.txt").write_text("nothing of use")
    (tmp_path / "2-kernel.1-03-final_bundles.txt").write_text(LISTING)
    (tmp_path / "2-kernel.1-01-final_hlo-static-per-bundle-utilization.txt").write_text(UNITS)
    code = read_code(tmp_path)
    assert (code.whole.bundles, code.masked.bundles) == (1, 4)
    assert code.row_bundles == 9 - 1 - 4
    assert code.units["MXU"] == 0.25
    with pytest.raises(ValueError, match="no loop with matrix products"):
        read_code(tmp_path / "..")


def test_units_are_shares_of_what_the_bundles_of_the_loop_could_hold() -> None:
    units = units_of(UNITS, Loop(3, 7, 2, 2))
    assert units == {"MXU": 0.25, "XLU": 0.0, "VALU": 0.25, "SALU": 0.125, "scalar only": 0.25, "nothing": 0.25}


def test_estimates_follow_the_slower_of_memory_and_work() -> None:
    chip = chips()["v5e"]
    light = Code((Loop(0, 100, 2, 1),), 0, {})
    memory_bound = figures(OURS, DECODE, chip, light)
    assert memory_bound["bound_us"] == pytest.approx(2 * 64 * 2048 * 8 * 128 * 2 / 819e3, abs=0.01)
    assert memory_bound["compute_us"] == pytest.approx(64 * 4 * 100 / 1500, abs=0.01)
    assert 1 <= memory_bound["estimate_over_bound"] < 1.01
    heavy = figures(OURS, DECODE, chip, Code((Loop(0, 10**6, 2, 1),), 0, {}))
    assert heavy["estimate_us"] == pytest.approx(heavy["compute_us"], rel=0.01)


def test_jaxs_kernels_are_counted_for_all_heads_and_queries() -> None:
    chip, code = chips()["v5e"], Code((Loop(0, 100, 2, 1),), 7, {})
    assert figures(PAGED, DECODE, chip, code)["bundles_per_512_keys"] == 800
    assert figures(RAGGED, DECODE, chip, code)["bundles_per_512_keys"] == 100
    assert figures(RAGGED, replace(DECODE, width=256), chip, code)["bundles_per_512_keys"] == 200


def test_ratios_are_taken_within_a_shape_and_refusals_are_shown() -> None:
    rows = [
        {"kernel": OURS, "shape": {"name": "a"}, "bundles_per_512_keys": 300},
        {"kernel": RAGGED, "shape": {"name": "a"}, "bundles_per_512_keys": 600},
        {"kernel": OURS, "shape": {"name": "b"}, "bundles_per_512_keys": 300},
        {"kernel": RAGGED, "shape": {"name": "b"}, "error": "AssertionError: no\nmore"},
    ]
    compared = list(compare(rows))
    assert [row["bundles_over_ragged"] for row in compared] == [0.5, 1.0, None, None]
    assert "refused: AssertionError: no" in table(compared)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; pip install 'quire[tpu]'"
)
def test_decode_takes_half_of_the_bundles_of_jaxs_ragged_kernel_and_is_bound_by_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 5's goals; measured 918 / 2416 bundles."""
    monkeypatch.setattr(kernels, "KERNELS", (OURS, RAGGED))
    assert main(["bench", "kernels", "--target", "v5e", "--shapes", "decode, blocks of 128"]) == 0
    ours, ragged = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert ours["kernel"] == OURS
    assert ours["bundles_per_512_keys"] <= 0.5 * ragged["bundles_per_512_keys"]
    assert ours["estimate_over_bound"] <= 1.15
    assert ours["units"]["MXU"] > 0
