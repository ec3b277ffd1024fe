"""The roofline of a step, worked out by hand for small cases; and laws: more work never takes less, a better chip never more."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.backends.chips import all_chips, read_chips
from quire.backends.roofline import Efficiency, ModelCost, Roofline, Work, read_efficiencies
from quire.backends.simulated import SimulatedBackend
from quire.kernels.errors import BackendError, InvalidConfigError

PERFECT = Efficiency(weights=1.0, attention=1.0, compute=1.0, collective_us=0.0, dispatch_us=0.0)
CHIP = dataclasses.replace(all_chips()["v6e"], hbm_gb_per_s=1000.0, bf16_tflops=100.0, link_gb_per_s=100.0)
DENSE = ModelCost(
    num_layers=2,
    dense_bytes=10**9,
    dense_flops=10.0**9,
    expert_bytes=0,
    expert_flops=0.0,
    num_experts=0,
    experts_per_token=0,
    head_bytes=10**8,
    head_flops=10.0**8,
    token_bytes=1000,
    kv_bytes=((None, 1000),),
    pair_flops=((None, 100.0),),
)
MIXTURE = dataclasses.replace(DENSE, expert_bytes=10**8, expert_flops=10.0**8, num_experts=16, experts_per_token=2)
NOBODY = np.zeros(0, np.int64)


def contexts(*lengths: int) -> np.ndarray:
    return np.array(lengths, np.int64)


def test_a_decode_step_takes_what_streaming_takes() -> None:
    found = Roofline(CHIP, PERFECT, 1).seconds(DENSE, Work(2, 2, contexts(100_000, 200_000)))
    assert found.dense == pytest.approx(10**9 / 1e12)
    assert found.head == pytest.approx(10**8 / 1e12)
    assert found.attention == pytest.approx(300_000 * 1000 / 1e12)
    assert found.collectives == 0.0
    assert found.total == pytest.approx(found.dense + found.head + found.attention)


def test_many_tokens_take_what_products_take() -> None:
    found = Roofline(CHIP, PERFECT, 1).seconds(DENSE, Work(10_000, 1, NOBODY))
    assert found.dense == pytest.approx(10_000 * 10**9 / 1e14)


def test_a_prompt_sees_what_came_before_it_and_itself() -> None:
    """1,024 tokens after 512: each tile of 128 reads all up to its end, and sees half of itself."""
    model = dataclasses.replace(DENSE, pair_flops=((None, 1e9),))
    found = Roofline(CHIP, PERFECT, 1).seconds(model, Work(1024, 0, NOBODY, chunks=[(512, 1024)]))
    pairs = sum(512 + idx + 1 for idx in range(1024))
    assert found.attention == pytest.approx(pairs * 1e9 / 1e14)
    read = Roofline(CHIP, PERFECT, 1).seconds(DENSE, Work(1024, 0, NOBODY, chunks=[(512, 1024)]))
    assert read.attention == pytest.approx(sum(512 + 128 * (idx + 1) for idx in range(8)) * 1000 / 1e12)


def test_a_window_is_read_and_no_more() -> None:
    windowed = dataclasses.replace(DENSE, kv_bytes=((64, 1000),), pair_flops=((64, 100.0),))
    roofline = Roofline(CHIP, PERFECT, 1)
    far, near = (roofline.seconds(windowed, Work(1, 1, contexts(length))).attention for length in (10_000, 64))
    assert far == near == pytest.approx(64 * 1000 / 1e12)


def test_what_is_gathered_is_paid_for_whatever_rows_attend_to() -> None:
    roofline = Roofline(CHIP, PERFECT, 1)
    found = roofline.seconds(DENSE, Work(4, 4, contexts(5), gathered_tokens=4096)).attention
    assert found == pytest.approx(4096 * 1000 / 1e12)


def test_devices_sum_twice_a_layer_and_once_more() -> None:
    efficiency = dataclasses.replace(PERFECT, collective_us=10.0)
    found = Roofline(CHIP, efficiency, 4).seconds(DENSE, Work(100, 0, NOBODY)).collectives
    assert found == pytest.approx(5 * (10e-6 + 2 * 3 / 4 * 100 * 1000 / 100e9))


def test_few_tokens_read_few_experts_and_many_read_all() -> None:
    assert MIXTURE.bytes_of_experts(1) == pytest.approx(2 * 10**8)
    assert MIXTURE.bytes_of_experts(10_000) == pytest.approx(16 * 10**8)
    assert DENSE.bytes_of_experts(5) == 0.0


WORK = st.builds(
    lambda rows, tokens, logits, chunk: (rows, tokens, logits, chunk),
    st.lists(st.integers(1, 5000), max_size=6),
    st.integers(1, 2000),
    st.integers(0, 64),
    st.tuples(st.integers(0, 3000), st.integers(1, 700)),
)


@given(WORK, st.integers(1, 8), st.sampled_from([DENSE, MIXTURE]))
def test_more_work_never_takes_less_and_better_chips_never_take_more(work, num_devices, model) -> None:
    rows, tokens, logits, chunk = work
    chip_efficiency = Efficiency(0.5, 0.4, 0.3, 20.0, 0.0)
    roofline = Roofline(CHIP, chip_efficiency, num_devices)
    base = Work(tokens, logits, contexts(*rows), chunks=[chunk])
    seconds = roofline.seconds(model, base).total
    for more in (
        dataclasses.replace(base, num_tokens=tokens + 1),
        dataclasses.replace(base, num_logit_rows=logits + 1),
        dataclasses.replace(base, decode_contexts=contexts(*rows, 7)),
        dataclasses.replace(base, decode_contexts=contexts(*rows) + 1),
        dataclasses.replace(base, chunks=[(chunk[0], chunk[1] + 1)]),
        dataclasses.replace(base, chunks=[(chunk[0] + 1, chunk[1])]),
    ):
        assert roofline.seconds(model, more).total >= seconds * (1 - 1e-12)
    for chip in (
        dataclasses.replace(CHIP, hbm_gb_per_s=1100.0),
        dataclasses.replace(CHIP, bf16_tflops=110.0),
        dataclasses.replace(CHIP, link_gb_per_s=110.0),
    ):
        assert Roofline(chip, chip_efficiency, num_devices).seconds(model, base).total <= seconds


def test_every_chip_has_an_efficiency_between_none_and_all() -> None:
    found = read_efficiencies()
    assert set(found) == set(all_chips())
    for each in found.values():
        for share in (each.efficiency.weights, each.efficiency.attention, each.efficiency.compute):
            assert 0 < share <= 1
        assert each.source


def test_a_price_is_that_of_whole_machines_where_they_are_rented_so() -> None:
    chips = all_chips()
    assert chips["v5e"].price(8) == pytest.approx(9.6)
    assert chips["inf2"].price(2) == pytest.approx(0.7582)
    assert chips["inf2"].price(3) == pytest.approx(2 * 0.7582)
    assert chips["trn1"].price(32) == pytest.approx(min(16 * 1.3438, 21.5))
    assert chips["tpu7x"].price(4) is None


def test_users_add_chips_of_their_own(tmp_path: Path) -> None:
    entry = {**json.loads((Path(__file__).parents[2] / "backends" / "chips.json").read_text())["v6e"], "hbm_gib": 64}
    chips_file, efficiency_file = tmp_path / "chips.json", tmp_path / "efficiency.json"
    chips_file.write_text(json.dumps({"v9": entry}))
    with pytest.raises(BackendError, match="nothing says how much of its numbers v9 reaches"):
        SimulatedBackend("v9:4", chips_file=chips_file)
    factors = {
        "weights": 1,
        "attention": 1,
        "compute": 1,
        "collective_us": 0,
        "dispatch_us": 0,
        "fitted": [],
        "source": "me",
    }
    efficiency_file.write_text(json.dumps({"v9": factors}))
    backend = SimulatedBackend("v9:2x2", chips_file=chips_file, efficiency_file=efficiency_file)
    assert (backend.num_devices, backend.chip.hbm_gib) == (4, 64)
    assert "simulated v9" in backend.capabilities.platform
    for path, read in ((chips_file, read_chips), (efficiency_file, read_efficiencies)):
        path.write_text('{"v9": {"nonsense": 1}}')
        with pytest.raises(InvalidConfigError, match=str(path)):
            read(path)


@pytest.mark.parametrize("target", ["", "v6", "v6e:", "v6e:0", "v6e:x", "v6e:4:4"])
def test_what_names_no_devices_is_refused(target: str) -> None:
    with pytest.raises(BackendError, match="is not of the form CHIP or CHIP:DEVICES"):
        SimulatedBackend(target)


def test_a_simulated_device_lowers_nothing() -> None:
    backend = SimulatedBackend("inf2:2")
    for refuse in (lambda: backend.lower(abs, [], []), lambda: backend.compile(None), lambda: backend.profile(Path())):
        with pytest.raises(BackendError, match="computes nothing"):
            refuse()
