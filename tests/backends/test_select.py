"""A device is had by name or refused with the reason; the CPU refuses what it cannot do."""

from itertools import pairwise

import pytest

from quire.backends.cpu import CpuBackend
from quire.backends.environment import has_tpu
from quire.backends.select import DEVICES, select_backend, unavailable_reason
from quire.backends.shapes import decode_row_sizes
from quire.engine.config import EngineConfig, resolve_block_size, resolve_dtype
from quire.kernels.errors import BackendError, InvalidConfigError, KernelUnavailableError
from quire.kernels.op import Implementation, Op, OpContext
from quire.models.registry import load_config
from tests.engine.engines import tiny_folder

CONTEXT = OpContext("cpu", "cpu", "float32", num_heads=4, num_kv_heads=2, head_dim=16, block_size=16)


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_is_available_or_says_why_not(device: str) -> None:
    reason = unavailable_reason(device)
    if reason is None:
        assert select_backend(device).capabilities.platform == "cpu"
    else:
        with pytest.raises(BackendError, match="cannot be used"):
            select_backend(device)


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BackendError, match="'gpu' is not one of auto, cpu"):
        select_backend("gpu")


def test_a_model_over_several_cpu_devices_is_refused() -> None:
    with pytest.raises(BackendError, match="leave it at 1"):
        CpuBackend().make_mesh(2)


@pytest.mark.parametrize("most", [1, 2, 8, 9, 32, 33, 256])
def test_row_sizes_end_at_the_most_and_grow_by_no_more_than_the_factor(most: int) -> None:
    sizes = decode_row_sizes(most, 8, 4)
    assert sizes[0] == min(most, 8)
    assert sizes[-1] == most
    assert sizes == sorted(set(sizes))
    assert all(after <= 4 * before for before, after in pairwise(sizes))


def test_chips_are_found_by_what_their_vendor_and_device_say(tmp_path) -> None:
    def device(name: str, vendor: str, kind: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "device").write_text(kind + "\n")

    assert not has_tpu(tmp_path / "none")
    device("a", "0x1ae0", "0x0042")  # Google's network card
    device("b", "0x10de", "0x0063")
    assert not has_tpu(tmp_path)
    device("c", "0x1ae0", "0x0063")
    assert has_tpu(tmp_path)


def test_the_choice_of_a_kernel_says_why_others_were_passed_over() -> None:
    fast = Implementation("fast", lambda: 1, lambda context: None if context.platform == "tpu" else "needs a TPU")
    op = Op("twice", (fast, Implementation("reference", lambda: 2)))
    choice = op.choose(CONTEXT)
    assert choice.name == "reference"
    assert choice.describe() == "twice: reference (fast: needs a TPU)"
    with pytest.raises(KernelUnavailableError, match="needs a TPU"):
        op.choose(CONTEXT, "fast")
    with pytest.raises(KernelUnavailableError, match="there are: fast, reference"):
        op.choose(CONTEXT, "faster")


def test_dtype_and_block_size_are_the_devices_unless_asked_for() -> None:
    model = load_config(tiny_folder(dtype="float16"))
    capabilities = CpuBackend().capabilities
    automatic = resolve_dtype(EngineConfig(), model, capabilities)
    assert automatic == (capabilities.default_dtype or "bfloat16")
    assert resolve_dtype(EngineConfig.from_arguments(dtype="bfloat16"), model, capabilities) == "bfloat16"
    assert resolve_block_size(EngineConfig(), capabilities) == capabilities.block_size
    assert resolve_block_size(EngineConfig.from_arguments(block_size=7), capabilities) == 7
    with pytest.raises(InvalidConfigError, match="at least 1"):
        EngineConfig.from_arguments(block_size=-1)
