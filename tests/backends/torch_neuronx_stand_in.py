"""Stands in for torch-neuronx: checks every call as strictly as its documentation allows, and runs programs on XLA's CPU client.

`install()` gives torch the names that importing torch_neuronx gives it. A NEFF is what neuronx_cc.py writes: a magic word, the target,
and the HLO, which is compiled here for as many replicas as there are cores. Misuse raises AssertionError, which a real device would
answer with whatever it likes.
"""

import os
import re
import sys
from types import ModuleType, SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import torch
from jax._src import compiler
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib import xla_client

TORCH_OF = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "i32": torch.int32,
    "ui32": torch.int32,
    "i8": torch.int8,
    "i1": torch.uint8,
}
NUMPY_OF = {
    "f32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "i32": np.int32,
    "ui32": np.uint32,
    "i8": np.int8,
    "i1": np.bool_,
}
calls: dict[str, int] = {}


class Tensor:
    """On the cores: a part on each."""

    def __init__(self, parts: list[torch.Tensor]) -> None:
        assert _state.is_initialized, "_init_neuron comes first"
        assert parts
        assert all(isinstance(part, torch.Tensor) and part.is_contiguous() for part in parts)
        assert len({(part.shape, part.dtype) for part in parts}) == 1, "parts differ in shape or dtype"
        assert parts[0].dtype in TORCH_OF.values(), f"{parts[0].dtype} does not exist there"
        self.parts = [part.clone() for part in parts]


class ParallelModel:
    def __init__(self, neff: bytes, tp_degree: int, first_core: int, core_count: int) -> None:
        assert isinstance(neff, bytes)
        target, _, proto = neff.removeprefix(b"NEFF").partition(b"\0")
        assert neff.startswith(b"NEFF")
        assert target.decode() == os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"], "compiled for another chip"
        assert tp_degree == core_count == int(os.environ["NEURON_RT_NUM_CORES"])
        assert first_core == 0
        text = xla_client._xla.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(proto))
        text = text if isinstance(text, str) else text.decode()
        main = text[text.index("func.func @main(") :] if "func.func @main(" in text else text[text.index("@main(") :]
        head = main[: main.index("{\n")]
        given, _, returned = head.partition("->")
        self.parameters = re.findall(r"tensor<((?:\d+x)*)(\w+)>", given)
        self.results = re.findall(r"tensor<((?:\d+x)*)(\w+)>", returned)
        self.aliases = dict(_aliases(text))
        assert "partition_id" not in text, "one rank's program has no partitions"
        self.num_ranks, self.text, self.executable = tp_degree, text, None

    def load(self) -> None:
        assert os.environ.get("NEURON_RT_IO_RING_CACHE_SIZE") == "1"
        client = jax.devices("cpu")[0].client
        devices = client.local_devices()[: self.num_ranks]
        options = compiler.get_compile_options(
            num_replicas=self.num_ranks, num_partitions=1, device_assignment=np.arange(self.num_ranks).reshape(-1, 1)
        )
        options.executable_build_options.use_spmd_partitioning = False
        self.executable = client.compile_and_load(self.text, xla_client.DeviceList(tuple(devices)), options)
        self.mesh = Mesh(np.array(devices), ("rank",))


class ParallelTensorSet:
    def __init__(self, names: list[str], tp_degree: int) -> None:
        kind = names[0].rstrip("0123456789")
        assert kind in ("input", "output")
        assert names == [f"{kind}{idx}" for idx in range(len(names))]
        self.kind, self.tp_degree, self.tensors, self.is_ready = kind, tp_degree, [None] * len(names), False

    def init(self) -> None:
        self.is_ready = True

    def add(self, index: int, tensor: Tensor) -> None:
        assert self.is_ready, "init comes first"
        assert self.tensors[index] is None, f"{self.kind}{index} is bound already"
        assert len(tensor.parts) == self.tp_degree
        self.tensors[index] = tensor


def _init_neuron() -> None:
    assert not _state.is_initialized, "initialized twice"
    _state.is_initialized = True


def _parallel_to_neuron(parts: list[torch.Tensor]) -> Tensor:
    return Tensor(parts)


def _parallel_from_neuron(tensor: Tensor) -> list[torch.Tensor]:
    return [part.clone() for part in tensor.parts]


def _parallel_write_neuron(tensor: Tensor, parts: list[torch.Tensor]) -> None:
    assert len(parts) == len(tensor.parts)
    for old, new in zip(tensor.parts, parts, strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype), f"{new.shape} {new.dtype} into {old.shape} {old.dtype}"
        old.copy_(new)


def _parallel_run_neuron(model: ParallelModel, inputs: ParallelTensorSet, outputs: ParallelTensorSet) -> None:
    assert model.executable is not None, "load comes first"
    assert (inputs.kind, outputs.kind) == ("input", "output")
    calls["run"] = calls.get("run", 0) + 1
    _check("input", inputs, model.parameters)
    _check("output", outputs, model.results)
    for result, parameter in model.aliases.items():
        assert outputs.tensors[result] is inputs.tensors[parameter], f"output{result} is aliased to input{parameter}"
    arguments = [
        _as_array(tensor, kind, model.mesh) for tensor, (_, kind) in zip(inputs.tensors, model.parameters, strict=True)
    ]
    found = model.executable.execute_sharded(arguments).disassemble_into_single_device_arrays()
    for tensor, (_, kind), parts in zip(outputs.tensors, model.results, found, strict=True):
        for part, new in zip(tensor.parts, parts, strict=True):
            part.copy_(_to_torch(np.asarray(new), kind).reshape(part.shape))


def _check(kind: str, bound: ParallelTensorSet, expected: list[tuple[str, str]]) -> None:
    assert len(bound.tensors) == len(expected), f"{len(bound.tensors)} {kind}s bound, the program has {len(expected)}"
    for idx, (tensor, (dims, dtype)) in enumerate(zip(bound.tensors, expected, strict=True)):
        assert tensor is not None, f"{kind}{idx} is not bound"
        shape = tuple(int(size) for size in dims.split("x") if size)
        assert tuple(tensor.parts[0].shape) == shape, f"{kind}{idx} is {tuple(tensor.parts[0].shape)}, not {shape}"
        assert tensor.parts[0].dtype == TORCH_OF[dtype], f"{kind}{idx} is {tensor.parts[0].dtype}, not {dtype}"


def _as_array(tensor: Tensor, kind: str, mesh: Mesh) -> jax.Array:
    """The parts one after another, which is how the client takes the arguments of replicas."""
    parts = [_to_numpy(part, kind) for part in tensor.parts]
    parts = [part if part.ndim else part.reshape(()) for part in parts]
    devices = list(mesh.devices.flat)
    placed = [jax.device_put(part, device) for part, device in zip(parts, devices, strict=True)]
    if parts[0].ndim == 0:  # the same on every rank
        return jax.make_array_from_single_device_arrays((), NamedSharding(mesh, PartitionSpec()), placed)
    shape = (len(parts) * parts[0].shape[0], *parts[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, PartitionSpec("rank")), placed)


def _to_numpy(part: torch.Tensor, kind: str) -> np.ndarray:
    part = part.view(torch.int16) if part.dtype == torch.bfloat16 else part
    return part.numpy().copy().view(NUMPY_OF[kind])


def _to_torch(values: np.ndarray, kind: str) -> torch.Tensor:
    view = {"bf16": np.int16, "ui32": np.int32, "i1": np.uint8}.get(kind)
    tensor = torch.from_numpy(np.array(values, copy=True) if view is None else np.array(values, copy=True).view(view))
    return tensor.view(torch.bfloat16) if kind == "bf16" else tensor


def _aliases(text: str) -> list[tuple[int, int]]:
    """(result, parameter) of every parameter that a result takes the place of."""
    found = re.findall(r"parameter_number = (\d+) : i64\}, output_index = array<i64: (\d+)>", text)
    assert found or "input_output_alias = []" in text
    return [(int(result), int(parameter)) for parameter, result in found]


_state = SimpleNamespace(is_initialized=False)
OPERATIONS = (_init_neuron, _parallel_to_neuron, _parallel_from_neuron, _parallel_write_neuron, _parallel_run_neuron)


def install(*, without: str = "") -> None:
    """Makes `import torch_neuronx` work, and torch have its names but for one."""
    sys.modules["torch_neuronx"] = ModuleType("torch_neuronx")
    named = {operation.__name__: operation for operation in OPERATIONS if operation.__name__ != without}
    torch.ops.neuron = SimpleNamespace(**named)
    torch.classes.neuron = SimpleNamespace(ParallelModel=ParallelModel, ParallelTensorSet=ParallelTensorSet)
