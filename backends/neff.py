"""Programs on NeuronCores without jax's plugin: jax lowers, neuronx-cc compiles, torch-neuronx loads and runs.

For hosts that carry AWS's torch packages, or a plugin that is too old for the jax at hand. Three designs were weighed. (1) A second
model runner: the step's logic twice. (2) Arrays that pretend to be jax's behind the calls that there are: they cannot be, jax looks
inside. (3) What puts arrays on devices is a part of the backend (`quire.backends.memory`), and a program is anything that can be called
with what was put there. (3) it is: the runner, the loader and the step do not know which runtime they are on.

Weights and state are bound once to every program that takes them, state to its input and its output at once, so that it is updated
in place; what the host sends is copied into tensors that are bound as well. One thread runs programs in the order in which they were
called, and copies their results back, so that a call returns at once.

torch-neuronx's names that begin with an underscore are internal to it: they are looked up at start, and those that are missing are named.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from quire.backends.memory import Read
from quire.backends.neuron_compiler import NeuronCompiler
from quire.backends.rank_program import RankProgram, rank_program
from quire.kernels.errors import BackendError
from quire.kernels.paged_attention.contract import CacheFormat

logger = logging.getLogger(__name__)

_OPERATIONS = (
    "_init_neuron",
    "_parallel_to_neuron",
    "_parallel_from_neuron",
    "_parallel_write_neuron",
    "_parallel_run_neuron",
)
_CLASSES = ("ParallelModel", "ParallelTensorSet")
# torch sees unsigned integers as signed ones, and predicates as bytes.
_TORCH_VIEWS = {"uint32": np.int32, "uint16": np.int16, "bool": np.uint8, "bfloat16": np.int16}


class DeviceTensor:
    """An array on the cores, whole or a part on each; what the runtime holds it by is `handle`."""

    def __init__(
        self,
        handle: Any,
        shape: tuple[int, ...],
        dtype: np.dtype,
        sharding: NamedSharding | None,
        wait: Callable[[], None],
    ) -> None:
        self.handle, self.shape, self.dtype, self.sharding = handle, shape, dtype, sharding
        self._wait = wait

    def block_until_ready(self) -> DeviceTensor:
        """Waits for every program that was called before."""
        self._wait()
        return self


class PendingArray:
    """A result that is still computed, or already there: an array of the host as soon as somebody looks."""

    def __init__(self, future: Future[list[np.ndarray]], idx: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._future, self._idx = future, idx
        self.shape, self.dtype = shape, dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self._future.result()[self._idx]
        return found if dtype is None else found.astype(dtype)

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index]

    def copy_to_host_async(self) -> None:
        """It is on its way already."""

    def block_until_ready(self) -> PendingArray:
        """Waits for it, and raises what went wrong."""
        self._future.result()
        return self


class NeffRuntime:
    """torch-neuronx on `num_cores` cores from the first that the process sees. A `quire.backends.memory.DeviceMemory`."""

    def __init__(self, num_cores: int, compiler: NeuronCompiler) -> None:
        """Raises BackendError where torch-neuronx is not installed, or lacks a name."""
        self.num_cores, self._compiler = num_cores, compiler
        self._torch = importlib.import_module("torch")
        importlib.import_module("torch_neuronx")
        self._ops, self._classes = self._torch.ops.neuron, self._torch.classes.neuron
        missing = [name for name in _OPERATIONS if not hasattr(self._ops, name)]
        missing += [name for name in _CLASSES if not hasattr(self._classes, name)]
        if missing:
            raise BackendError(
                f"this torch-neuronx lacks {', '.join(missing)}, which are internal to it and were there in the SDKs that quire was "
                "written for; use jax's plugin (neuron_runtime=pjrt), or another version"
            )
        # Nothing is documented of its use by several threads, and programs are loaded while others are compiled: all calls are this one's.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="neuron")
        self._call(self._ops._init_neuron)
        self.held_bytes = 0
        """Of each core's memory, in arrays that were put there."""

    # ---- memory

    def put(self, mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...], dtype: np.dtype, read: Read) -> DeviceTensor:
        """See `DeviceMemory`."""
        parts = [np.asarray(read(_part(spec, shape, rank, mesh.size))) for rank in range(mesh.size)]
        sharding = NamedSharding(mesh, spec) if mesh.size > 1 else None
        return DeviceTensor(self.upload(parts), shape, np.dtype(dtype), sharding, self.wait)

    def allocate(
        self, mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...], dtype: np.dtype, cache_format: CacheFormat
    ) -> DeviceTensor:
        """See `DeviceMemory`; zeros, since tensors come from the host."""
        del cache_format  # any content will do
        return self.put(mesh, spec, shape, dtype, lambda index: np.zeros([_length(part) for part in index], dtype))

    def upload(self, parts: Sequence[np.ndarray]) -> Any:
        """A tensor on the cores of one part each, by its handle."""
        self.held_bytes += parts[0].nbytes
        return self._call(self._ops._parallel_to_neuron, [self.to_torch(part) for part in parts])

    def wait(self) -> None:
        """Until all that was called has run."""
        self._call(lambda: None)

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function gives on the thread, after all that was asked of it before."""
        return self._thread.submit(function, *arguments).result()

    # ---- programs

    def load(self, lowered: Any) -> Callable[..., Any]:
        """Compiles what was lowered with all its arguments kept, and loads it onto the cores."""
        program = rank_program(lowered)
        neff = self._compiler.compile(program, str(program.text.partition("@")[2].partition(" ")[0]))
        return NeffProgram(self, program, self._call(self._load, neff), lowered.out_tree)

    def _load(self, neff: bytes) -> Any:
        model = self._classes.ParallelModel(neff, self.num_cores, 0, self.num_cores)
        model.load()
        return model

    def tensor_set(self, kind: str, tensors: Sequence[Any]) -> Any:
        """Tensors bound as a program's inputs or outputs, in order."""
        names = [f"{kind}{idx}" for idx in range(len(tensors))]

        def bind() -> Any:
            bound = self._classes.ParallelTensorSet(names, self.num_cores)
            bound.init()
            for idx, tensor in enumerate(tensors):
                bound.add(idx, tensor)
            return bound

        return self._call(bind)

    def submit(
        self,
        model: Any,
        inputs: Any,
        outputs: Any,
        sent: Sequence[tuple[Any, np.ndarray]],
        returned: Sequence[tuple[Any, np.dtype]],
    ) -> Future[list[np.ndarray]]:
        """Copies what the host sends, runs, and copies results back, after whatever was submitted before."""

        def run() -> list[np.ndarray]:
            for tensor, values in sent:
                self._ops._parallel_write_neuron(tensor, [self.to_torch(values)] * self.num_cores)
            self._ops._parallel_run_neuron(model, inputs, outputs)
            # The same on every rank: one is enough.
            return [self.to_numpy(self._ops._parallel_from_neuron(tensor)[0], dtype) for tensor, dtype in returned]

        return self._thread.submit(run)

    def to_torch(self, values: np.ndarray) -> Any:
        """As torch holds it: in the same bits."""
        values = np.array(values, order="C", copy=True)
        view = _TORCH_VIEWS.get(values.dtype.name)
        tensor = self._torch.from_numpy(values if view is None else values.view(view))
        return tensor.view(self._torch.bfloat16) if values.dtype.name == "bfloat16" else tensor

    def to_numpy(self, tensor: Any, dtype: np.dtype) -> np.ndarray:
        """The same bits as numpy has them."""
        if dtype.name == "bfloat16":
            tensor = tensor.view(self._torch.int16)
        values: np.ndarray = tensor.numpy()
        return values.copy().view(dtype)


class NeffProgram:
    """A loaded program, called like the function that it was made of. Weights and state must be those of the first call."""

    def __init__(self, runtime: NeffRuntime, program: RankProgram, model: Any, out_tree: Any) -> None:
        self._runtime, self._program, self._model, self._out_tree = runtime, program, model, out_tree
        self._bound: list[DeviceTensor | None] | None = None
        self._inputs: Any = None
        self._outputs: Any = None
        self._staged: list[tuple[int, Any]] = []
        self._own_results: list[tuple[int, Any]] = []

    def __call__(self, *arguments: Any) -> Any:
        """Runs as soon as what was called before has; state comes back as it is, other results as PendingArray."""
        leaves = jax.tree.leaves(arguments)
        held = [leaf if isinstance(leaf, DeviceTensor) else None for leaf in leaves]
        if self._bound is None:
            self._bind(leaves, held)
        elif any(given is not bound for given, bound in zip(held, self._bound, strict=True)):
            raise BackendError("a program was called with other tensors than those it is bound to")
        sent = [(tensor, np.asarray(leaves[idx])) for idx, tensor in self._staged]
        returned = [(tensor, self._program.results[idx][1]) for idx, tensor in self._own_results]
        future = self._runtime.submit(self._model, self._inputs, self._outputs, sent, returned)
        results: list[Any] = [None] * len(self._program.results)
        for result, parameter in self._program.aliases.items():
            results[result] = leaves[parameter]
        for place, (idx, _) in enumerate(self._own_results):
            results[idx] = PendingArray(future, place, *self._program.results[idx])
        return jax.tree.unflatten(self._out_tree, results)

    def _bind(self, leaves: Sequence[Any], held: list[DeviceTensor | None]) -> None:
        program, num_cores = self._program, self._runtime.num_cores
        assert len(leaves) == program.num_parameters, (len(leaves), program.num_parameters)
        inputs = []
        for idx, (leaf, tensor) in enumerate(zip(leaves, held, strict=True)):
            handle = self._runtime.upload([np.asarray(leaf)] * num_cores) if tensor is None else tensor.handle
            inputs.append(handle)
            if tensor is None:
                self._staged.append((idx, handle))
        outputs = []
        for idx, (shape, dtype) in enumerate(program.results):
            parameter = program.aliases.get(idx)
            if parameter is None:
                handle = self._runtime.upload([np.zeros(shape, dtype)] * num_cores)
                self._own_results.append((idx, handle))
            else:
                handle = inputs[parameter]
            outputs.append(handle)
        self._inputs = self._runtime.tensor_set("input", inputs)
        self._outputs = self._runtime.tensor_set("output", outputs)
        self._bound = held


def _part(spec: PartitionSpec, shape: tuple[int, ...], rank: int, num_ranks: int) -> tuple[slice, ...]:
    """Where a rank's part of an array lies."""
    axes = [*spec, *[None] * (len(shape) - len(spec))]
    return tuple(
        slice(0, size) if axis is None else slice(rank * (size // num_ranks), (rank + 1) * (size // num_ranks))
        for axis, size in zip(axes, shape, strict=True)
    )


def _length(part: slice) -> int:
    return int(part.stop - part.start)
