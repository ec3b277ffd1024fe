"""One rank's program out of one that was lowered for a mesh: what a compiler without a partitioner is given.

A step is written for one device and put under a shard_map (`quire.engine.programs.spread`). Lowered, it is a computation by hand within a
module for the whole mesh. Every rank runs the same body on its own part of the arguments, so the body becomes the module: collectives
name replicas instead of partitions, and what is donated is bound to the result that takes its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import jaxlib.xla_client
import numpy as np
from jax.interpreters import mlir

ir: Any = mlir.ir

_MANUAL = "sdy.manual_computation"


@dataclass(frozen=True)
class RankProgram:
    """What a compiler is given for one rank."""

    hlo: bytes
    """A serialized HloModuleProto: parameters in order, a tuple as its result, donated parameters aliased."""
    text: str
    """The same as StableHLO. Equal programs have equal texts; numbers in the proto depend on what else was converted before."""
    num_parameters: int
    results: tuple[tuple[tuple[int, ...], np.dtype], ...]
    """Shape and dtype of each result, on one rank."""
    aliases: dict[int, int]
    """For a result that takes the place of a parameter, which one."""


def rank_program(lowered: Any) -> RankProgram:
    """The program of one rank.

    `lowered` is a jax.stages.Lowered of a program for one device, or of one that is a shard_map over all of its mesh and nothing more.
    Raises ValueError for any other program over several devices.
    """
    module = rank_module(lowered.compiler_ir("stablehlo"))
    text = module.operation.get_asm(enable_debug_info=False)
    main = _main(module)
    with module.context:
        kinds = ir.FunctionType(ir.TypeAttr(main.attributes["function_type"]).value)
        results = tuple((tuple(kind.shape), _DTYPES[str(kind.element_type)]) for kind in kinds.results)
        places = [ir.DictAttr(attributes) for attributes in ir.ArrayAttr(main.attributes["arg_attrs"])]
        aliases = {
            attributes["tf.aliasing_output"].value: idx
            for idx, attributes in enumerate(places)
            if "tf.aliasing_output" in attributes
        }
        num_parameters = len(kinds.inputs)
    hlo = _to_computation(text).as_serialized_hlo_module_proto()
    return RankProgram(hlo, text, num_parameters, results, aliases)


_DTYPES = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(jnp.bfloat16),
    "i32": np.dtype(np.int32),
    "ui32": np.dtype(np.uint32),
    "i8": np.dtype(np.int8),
    "i1": np.dtype(np.bool_),
}


def _main(module: Any) -> Any:
    return next(
        op.operation
        for op in module.body.operations
        if op.operation.name == "func.func" and op.attributes["sym_name"].value == "main"
    )


def rank_module(module: Any) -> Any:
    """The module of one rank as StableHLO, for as many replicas as the given module has partitions."""
    num_ranks = ir.IntegerAttr(module.operation.attributes["mhlo.num_partitions"]).value
    with module.context, ir.Location.unknown():
        module = ir.Module.parse(module.operation.get_asm(enable_debug_info=False))
        if num_ranks > 1:
            _take_body(module)
            _name_replicas(module.operation)
            number = ir.IntegerType.get_signless(32)
            module.operation.attributes["mhlo.num_partitions"] = ir.IntegerAttr.get(number, 1)
            module.operation.attributes["mhlo.num_replicas"] = ir.IntegerAttr.get(number, num_ranks)
        return module


def _take_body(module: Any) -> None:
    """Makes the computation within the main function the main function."""
    main, mesh = None, []
    for op in module.body.operations:
        if op.operation.name == "sdy.mesh":
            mesh.append(op)
        elif op.attributes["sym_name"].value == "main":
            main = op.operation
    assert main is not None
    block = main.regions[0].blocks[0]
    *prelude, manual, returned = [op.operation for op in block.operations]
    arguments = list(block.arguments)
    if manual.name != _MANUAL or list(returned.operands) != list(manual.results):
        raise ValueError("the program does more than one shard_map over its mesh")
    if any(operand in arguments for op in prelude for operand in op.operands):
        raise ValueError("the program computes with its arguments before its shard_map")
    body = manual.regions[0].blocks[0]
    local = {
        arguments.index(outer): inner
        for outer, inner in zip(manual.operands, body.arguments, strict=True)
        if outer in arguments
    }
    if len(local) != len(arguments):
        raise ValueError("the program has arguments that its shard_map does not take")
    inputs = [local[idx].type for idx in range(len(arguments))]
    *_, end = [op.operation for op in body.operations]
    function_type = ir.FunctionType.get(inputs, [value.type for value in end.operands])
    rank = ir.Operation.create(
        "func.func",
        attributes={
            "sym_name": ir.StringAttr.get("main"),
            "sym_visibility": ir.StringAttr.get("public"),
            "function_type": ir.TypeAttr.get(function_type),
            "arg_attrs": _aliases(main, inputs, function_type.results),
        },
        regions=1,
        ip=ir.InsertionPoint(main),
    )
    entry = rank.regions[0].blocks.append(*inputs)
    for idx, argument in enumerate(entry.arguments):
        local[idx].replace_all_uses_with(argument)
    for outer, inner in zip(manual.operands, body.arguments, strict=True):
        if outer not in arguments:
            inner.replace_all_uses_with(outer)
    for op in (*prelude, *(inner.operation for inner in body.operations)):
        if op == end:
            ir.Operation.create("func.return", operands=list(op.operands), ip=ir.InsertionPoint(entry))
        else:
            op.detach_from_parent()
            entry.append(op)
    for op in (main, *mesh):
        op.operation.erase()


def _aliases(main: Any, inputs: list[Any], results: list[Any]) -> Any:
    """For every argument that is donated the result that takes its place: the first of its type that none has yet."""
    free = list(range(len(results)))
    attributes = []
    for given, kind in zip(ir.ArrayAttr(main.attributes["arg_attrs"]), inputs, strict=True):
        place = None
        if "jax.buffer_donor" in ir.DictAttr(given):
            place = next((idx for idx in free if results[idx] == kind), None)
        if place is None:
            attributes.append(ir.DictAttr.get({}))
        else:
            free.remove(place)
            number = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), place)
            attributes.append(ir.DictAttr.get({"tf.aliasing_output": number}))
    return ir.ArrayAttr.get(attributes)


def _name_replicas(op: Any) -> None:
    """Collectives among replicas, which is what ranks are, instead of among partitions of one program."""
    for region in op.regions:
        for block in region.blocks:
            for inner in [inner.operation for inner in block.operations]:
                _name_replicas(inner)
                for name in ("channel_handle", "use_global_device_ids"):
                    if name in inner.attributes:
                        del inner.attributes[name]
                if inner.name == "stablehlo.partition_id":
                    rank = ir.Operation.create(
                        "stablehlo.replica_id", results=[inner.results[0].type], ip=ir.InsertionPoint(inner)
                    )
                    inner.results[0].replace_all_uses_with(rank.results[0])
                    inner.erase()


def _to_computation(module: str) -> Any:
    """The module as what XLA exchanges. jax's own `compiler_ir("hlo")` is made so, and only of what it lowered itself."""
    client: Any = jaxlib.xla_client
    return client._xla.mlir.mlir_module_to_xla_computation(module, use_tuple_args=False, return_tuple=True)
