"""`quire bench kernels` for NeuronCores: the emulator's counts add up, and are per row."""

import json
from dataclasses import replace

import pytest

from quire.bench.nki_kernels import DECODE, measure
from quire.server.cli import main

SMALL = replace(DECODE, num_keys=256)


@pytest.mark.parametrize("generation", ["gen2", "gen3"])
def test_a_row_costs_the_same_whatever_the_number_of_rows(generation: str) -> None:
    one, three = (measure(replace(SMALL, rows=rows), generation) for rows in (1, 3))
    assert three["dma_bytes"] == pytest.approx(one["dma_bytes"], rel=0.01)
    assert three["tensor_cycles"] == one["tensor_cycles"]
    assert one["shape"]["num_keys"] * 2 * 4 * 128 * 2 <= one["dma_bytes"], "every key and value is fetched"
    assert one["bound_us"] < one["least_us"] < one["most_us"]


def test_twice_the_keys_are_twice_the_bytes_and_the_bound() -> None:
    short, long = (measure(replace(SMALL, num_keys=keys), "gen2") for keys in (1024, 2048))
    assert long["bound_us"] == pytest.approx(2 * short["bound_us"], rel=0.01)
    assert long["dma_bytes"] == pytest.approx(2 * short["dma_bytes"], rel=0.05)


def test_a_generation_without_public_clocks_has_no_times(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--target", "gen4", "--shapes", "decode, 256"]) == 0
    captured = capsys.readouterr()
    (row,) = map(json.loads, captured.out.splitlines())
    assert row["generation"] == "gen4"
    assert "least_us" not in row
    assert "decode, 256 tokens" in captured.err
