"""The programs of an engine: what each is called with, and how one written for a single device becomes one for all that share a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from quire.backends.base import Backend, Program, StepShape
from quire.backends.memory import DeviceMemory
from quire.engine.device_state import DeviceState, StateSplit, num_row_words, write_row
from quire.engine.drafting import CatchUpInput, Weights
from quire.engine.step import ModelInput, StepConfig, changed_by, make_step, read_by

EVERYWHERE = PartitionSpec()


@dataclass(frozen=True)
class ProgramSource:
    """A program that is not compiled yet. `shape` is that of a step; None is the program that gives a slot to a request."""

    shape: StepShape | None
    function: Program
    arguments: tuple[Any, ...]
    """Trees of jax.ShapeDtypeStruct, sharded where several devices hold them."""
    donate: tuple[int, ...]
    split: StateSplit | None = None
    """Of the state that a step is called with."""

    def lower(self, backend: Backend) -> Any:
        """Into the compiler's input."""
        return backend.lower(self.function, self.arguments, self.donate)

    def describe(self) -> str:
        """For people."""
        return "slot update" if self.shape is None else self.shape.describe()


def step_source(
    config: StepConfig, shape: StepShape, weights: Weights, state: DeviceState, mesh: Mesh
) -> ProgramSource:
    """One shape's step for a mesh, from real or abstract parameters and state."""
    split = StateSplit(state, changed_by(config, shape), read_by(shape))
    leaves = jax.tree.leaves(state)
    read = abstract((weights_of(config, shape, weights), split.held(leaves), split.changed(leaves)))
    arguments = (*read, abstract_inputs(shape, mesh))
    out_specs = (specs_of(arguments[2]), EVERYWHERE)
    function = spread(make_step(config, shape, split), arguments, out_specs, mesh)
    return ProgramSource(shape, function, arguments, (2,), split)


def weights_of(config: StepConfig, shape: StepShape, weights: Weights) -> Weights:
    """Those that a step of this shape reads: one model's, unless it drafts, or what drafts reads along."""
    if shape.num_drafts or (config.drafter is not None and config.drafter.captured_layers(shape)):
        return weights
    return Weights(None, weights.draft) if shape.is_catch_up else Weights(weights.target)


def slot_update_source(slots: Any, mesh: Mesh) -> ProgramSource:
    """The program that writes one request's row; slots are real or abstract."""
    words = jax.ShapeDtypeStruct((num_row_words(slots),), np.uint32, sharding=everywhere(mesh))
    arguments = (abstract(slots), words)
    return ProgramSource(None, spread(write_row, arguments, specs_of(arguments[0]), mesh), arguments, (0,))


def spread(function: Program, arguments: Sequence[Any], out_specs: Any, mesh: Mesh) -> Program:
    """`function` as what each device of the mesh does with its part of the arguments; itself where there is one device.

    Results that `out_specs` calls whole must be the same on every device: the function sees to it.
    """
    if mesh.size == 1:
        return function
    in_specs = tuple(specs_of(argument) for argument in arguments)
    spread_over: Program = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return spread_over


def specs_of(tree: Any) -> Any:
    """How each leaf is cut; leaves that do not say are whole everywhere."""
    return jax.tree.map(lambda leaf: leaf.sharding.spec if _is_named(leaf) else EVERYWHERE, tree)


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings over a mesh of the arrays of a tree."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if _is_named(leaf) else None),
        tree,
    )


def abstract_on(tree: Any, sharding: NamedSharding | None) -> Any:
    """The same for arrays of the host that will be held so."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def everywhere(mesh: Mesh) -> NamedSharding | None:
    """Whole on every device; None where the devices are one, to which host arrays go by themselves."""
    return NamedSharding(mesh, EVERYWHERE) if mesh.size > 1 else None


def _is_named(leaf: Any) -> bool:
    return isinstance(getattr(leaf, "sharding", None), NamedSharding)


def abstract_inputs(shape: StepShape, mesh: Mesh) -> ModelInput | CatchUpInput:
    """What the host sends for one step of this shape."""
    rows, tiles, blocks = shape.decode_rows, shape.prefill_tiles, shape.context_blocks
    sharding = everywhere(mesh)

    def ints(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, np.int32, sharding=sharding)

    if shape.is_catch_up:
        return CatchUpInput(ints(tiles, CatchUpInput.COLUMNS + blocks))
    return ModelInput(
        decode=ints(rows, ModelInput.DECODE_COLUMNS + blocks) if rows else None,
        tiles=ints(tiles, ModelInput.TILE_COLUMNS + blocks) if tiles else None,
    )


def on_every_device(tree: Any, mesh: Mesh, memory: DeviceMemory) -> Any:
    """The tree's arrays of the host on the mesh's device, or whole on each of its devices."""
    return jax.tree.map(lambda leaf: memory.put(mesh, EVERYWHERE, leaf.shape, leaf.dtype, leaf.__getitem__), tree)


def build_all(
    backend: Backend,
    sources: Sequence[ProgramSource],
    build: Callable[[ProgramSource], Any],
    progress: Callable[[int, int, str], None] | None,
) -> list[Any]:
    """What `build` makes of every source, in order; `progress(done, total, what)` is called after each that is done.

    As many at once as the backend's compiler serves well.
    """
    with ThreadPoolExecutor(min(backend.capabilities.max_compile_threads, len(sources))) as pool:
        futures = {pool.submit(build, source): source for source in sources}
        for num_done, future in enumerate(as_completed(futures), start=1):
            future.result()
            if progress is not None:
                progress(num_done, len(sources), futures[future].describe())
    return [future.result() for future in futures]
