"""What stays on the device from step to step: the KV cache, and a row of state for every request that runs.

S slots (max_num_seqs) and one more, the sink, where padding reads and writes. L tokens of max_model_len, V vocabulary,
B biased tokens, NS stop tokens, NB bad words of LB tokens.

The newest token of a request and its position live here, not on the host, so that the next step can be launched before this
one's tokens have been read, several steps can run in one dispatch, and a speculative step can advance rows by different lengths.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from quire.backends.base import Capabilities
from quire.backends.memory import DeviceMemory
from quire.engine.sampling_params import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from quire.engine.step_data import AdmittedRequest
from quire.kernels.paged_attention.contract import CacheFormat
from quire.kernels.sampling.noise import seed_key
from quire.kernels.sampling.rows import SamplingMode
from quire.models.config import ModelConfig
from quire.models.parallel import MODEL_AXIS, num_held_kv_heads

# A request's stop tokens plus those of the model, which end a sequence too and are banned below min_tokens.
NUM_STOP_IDS = MAX_STOP_TOKEN_IDS + 16

# Numbers of a request's sampling parameters that its row has under the same names.
_PARAMS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
)


@flax.struct.dataclass
class Slots:
    """One row per slot; leading axis S + 1, or absent in the row of a single request."""

    tokens: Any  # [L] int32, prompt then output; anything from num_tokens on
    num_tokens: Any  # int32
    prompt_len: Any  # int32
    max_total_tokens: Any  # int32; a row that has so many tokens is not computed any further
    temperature: Any  # float32
    key: Any  # [2] uint32
    top_k: Any  # int32
    top_p: Any  # float32
    min_p: Any  # float32
    repetition_penalty: Any  # float32
    presence_penalty: Any  # float32
    frequency_penalty: Any  # float32
    bias_ids: Any  # [B] int32
    bias_values: Any  # [B] float32
    allowed_mask: Any  # [ceil(V / 32)] uint32
    min_tokens: Any  # int32
    stop_ids: Any  # [NS] int32
    bad_words: Any  # [NB, LB] int32
    drafted: Any  # [4] int32; what a drafter's cache has of the row, by name in `quire.engine.drafting.Drafted`


@flax.struct.dataclass
class DeviceState:
    """What a program changes of it is donated to it and returned by it; never copied."""

    kv_cache: Any  # tuple of L arrays in the device's `CacheFormat`, or one array with the layers along the block axis
    slots: Slots
    draft_cache: Any = None  # like kv_cache, a draft model's or a head's; under the same block tables
    draft_features: Any = None  # [S + 1, D], of each row's last token but one, for a head that drafts


class _Unread:
    """Stands for a leaf that a program is not given: whatever is done with it fails while the program is traced."""

    def __init__(self, field: str) -> None:
        self._field = field

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{self._field} is read, and said not to be")

    def __getitem__(self, key: Any) -> Any:
        raise AssertionError(f"{self._field} is read, and said not to be")


class StateSplit:
    """Which leaves of a state a program changes, and which it only reads. The former are donated to it and come back.

    Each leaf that goes in or comes back costs the host a microsecond or two in every step, so it is given no others.
    """

    def __init__(self, state: DeviceState, changed: Collection[str], read: Collection[str] = ()) -> None:
        """Both name fields of DeviceState or of Slots, which may be in both; the state may be abstract."""
        found, self._treedef = jax.tree_util.tree_flatten_with_path(state)
        fields = [_field_of(path) for path, _ in found]
        self._leaves: list[Any] = [_Unread(field) for field in fields]
        self.changed_at = tuple(idx for idx, field in enumerate(fields) if field in changed)
        self._held_at = tuple(idx for idx, field in enumerate(fields) if field in read and field not in changed)

    def held(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Of all leaves of a state, those that are only read."""
        return tuple([leaves[idx] for idx in self._held_at])

    def changed(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
        """Of all leaves of a state, those that are changed."""
        return tuple([leaves[idx] for idx in self.changed_at])

    def join(self, held: Sequence[Any], changed: Sequence[Any]) -> DeviceState:
        """The state of which these are the parts, while a program is traced."""
        leaves = list(self._leaves)
        for idx, leaf in zip((*self._held_at, *self.changed_at), (*held, *changed), strict=True):
            leaves[idx] = leaf
        state: DeviceState = jax.tree.unflatten(self._treedef, leaves)
        return state

    def changed_of(self, state: DeviceState, held: Sequence[Any]) -> tuple[Any, ...]:
        """The leaves to hand back of the state that a program has made, while it is traced; `held` are those it was given to read."""
        leaves = jax.tree.leaves(state)
        before = self.join(held, self.changed(leaves))
        assert all(new is old for new, old in zip(leaves, jax.tree.leaves(before), strict=True)), (
            "changed, and said not to be"
        )
        return self.changed(leaves)


def _field_of(path: Sequence[Any]) -> str:
    """The field of DeviceState, or of Slots, that a leaf belongs to."""
    name: str = path[1].name if path[0].name == "slots" else path[0].name
    return name


def empty_row(max_model_len: int, vocab_size: int) -> Slots:
    """The row of a slot that nobody holds: it has no tokens and may have none, so it is never active."""
    return Slots(
        tokens=np.zeros(max_model_len, np.int32),
        num_tokens=np.int32(0),
        prompt_len=np.int32(0),
        max_total_tokens=np.int32(0),
        temperature=np.float32(0.0),
        key=np.zeros(2, np.uint32),
        top_k=np.int32(0),
        top_p=np.float32(1.0),
        min_p=np.float32(0.0),
        repetition_penalty=np.float32(1.0),
        presence_penalty=np.float32(0.0),
        frequency_penalty=np.float32(0.0),
        bias_ids=np.full(MAX_LOGIT_BIAS, -1, np.int32),
        bias_values=np.zeros(MAX_LOGIT_BIAS, np.float32),
        allowed_mask=np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32),
        min_tokens=np.int32(0),
        stop_ids=np.full(NUM_STOP_IDS, -1, np.int32),
        bad_words=np.full((MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, np.int32),
        drafted=np.zeros(4, np.int32),
    )


def row_record(slot: int, row: Slots) -> np.ndarray:
    """The row in one piece of the host's memory, behind the number of its slot: one record, of 4-byte elements named as in Slots.

    What a request brings goes to the device as one array: each is a transfer, and some microseconds of the host also where there is none.
    """
    fields = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    dtype = np.dtype([("slot", np.int32), *((name, leaf.dtype, leaf.shape) for name, leaf in fields.items())])
    record = np.zeros(1, dtype)
    record["slot"] = slot
    for name, leaf in fields.items():
        record[name] = leaf
    return record


def request_row(admitted: AdmittedRequest, empty: np.ndarray) -> np.ndarray:
    """The record of a request that takes a slot, from its tokens and its sampling parameters; `empty` is that of a slot nobody holds."""
    record, params = empty.copy(), admitted.params
    row = record[0]
    assert params.seed is not None, "the engine gives every request a seed"
    row["slot"] = admitted.slot
    row["tokens"][: len(admitted.token_ids)] = admitted.token_ids
    row["num_tokens"] = len(admitted.token_ids)
    row["prompt_len"] = admitted.prompt_len
    row["max_total_tokens"] = admitted.max_total_tokens
    row["key"] = seed_key(params.seed)
    for name in _PARAMS:
        row[name] = getattr(params, name)
    if params.logit_bias:
        row["bias_ids"][: len(params.logit_bias)] = list(params.logit_bias)
        row["bias_values"][: len(params.logit_bias)] = list(params.logit_bias.values())
    if params.allowed_token_ids is not None:
        row["allowed_mask"] = _bitmask(params.allowed_token_ids, len(row["allowed_mask"]))
    row["stop_ids"][: len(admitted.stop_ids)] = admitted.stop_ids
    for idx, word in enumerate(admitted.bad_words):
        row["bad_words"][idx, MAX_BAD_WORD_TOKENS - len(word) :] = word
    row["drafted"] = (admitted.num_drafted, 0, *admitted.draft_hole)
    return record


def sampling_mode(params: SamplingParams) -> SamplingMode:
    """The least sampling program that honours `params`."""
    changes_logits = (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or bool(params.logit_bias)
        or params.allowed_token_ids is not None
        or bool(params.bad_words)
        or params.min_tokens > 0
    )
    is_random = params.temperature > 0.0
    truncates = is_random and (params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0)
    if changes_logits or truncates or params.logprobs is not None:
        return SamplingMode.FULL
    return SamplingMode.RANDOM if is_random else SamplingMode.GREEDY


def empty_slots(num_slots: int, max_model_len: int, vocab_size: int) -> Slots:
    """Slots [num_slots + 1, ...] that nobody holds, as numpy arrays; the last is the sink."""
    row = empty_row(max_model_len, vocab_size)
    slots: Slots = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (num_slots + 1, *leaf.shape)), row)
    return slots


def write_row(slots: Slots, words: jax.Array) -> Slots:
    """The slots with one row replaced; compiled once, with `slots` donated.

    `words` [W] uint32 are the bits of a `row_record`. Its slot is clipped: some devices fail on one out of range.
    """
    slot = jnp.clip(jax.lax.bitcast_convert_type(words[0], jnp.int32), 0, slots.num_tokens.shape[0] - 1)
    leaves, treedef = jax.tree.flatten(slots)
    written, begin = [], 1
    for all_rows in leaves:
        end = begin + math.prod(all_rows.shape[1:])
        new = jax.lax.bitcast_convert_type(words[begin:end], all_rows.dtype).reshape(all_rows.shape[1:])
        written.append(jax.lax.dynamic_update_index_in_dim(all_rows, new, slot, 0))
        begin = end
    assert begin == len(words), (begin, len(words))
    result: Slots = jax.tree.unflatten(treedef, written)
    return result


def num_row_words(slots: Slots) -> int:
    """W, of these slots, which may be abstract."""
    leaves: list[jax.Array] = jax.tree.leaves(slots)
    return 1 + sum(math.prod(leaf.shape[1:]) for leaf in leaves)


def cache_block_bytes(
    config: ModelConfig,
    capabilities: Capabilities,
    cache_format: CacheFormat,
    block_size: int,
    dtype: str,
    num_devices: int,
) -> int:
    """Bytes that one block takes over all layers on one of the devices that share it, padding of its memory layout included."""
    num_kv_heads = num_held_kv_heads(config, num_devices) // num_devices
    shape = cache_format.shape(1, block_size, num_kv_heads, config.head_dim)
    return config.num_layers * capabilities.padded_elements(shape) * jnp.dtype(dtype).itemsize


@dataclass(frozen=True)
class CacheArrays:
    """The arrays that hold an engine's cache: one, with layer l's blocks from l * num_blocks on, or one per layer."""

    is_shared: bool  # by all layers
    num_arrays: int
    shape: tuple[int, ...]  # of one, over all devices
    dtype: np.dtype
    spec: PartitionSpec

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        capabilities: Capabilities,
        cache_format: CacheFormat,
        num_blocks: int,
        block_size: int,
        dtype: str,
        num_devices: int,
    ) -> CacheArrays:
        """In the layout of the backend."""
        bits = np.dtype(capabilities.cache_bits_dtype.get(dtype, dtype))
        num_kv_heads = num_held_kv_heads(config, num_devices)
        shape = cache_format.shape(num_blocks, block_size, num_kv_heads, config.head_dim)
        spec = PartitionSpec(*(MODEL_AXIS if axis == cache_format.heads_axis else None for axis in range(len(shape))))
        if capabilities.scan_layers:
            return cls(True, 1, (config.num_layers * num_blocks, *shape[1:]), bits, spec)
        return cls(False, config.num_layers, shape, bits, spec)

    def allocate(self, cache_format: CacheFormat, mesh: Mesh, memory: DeviceMemory) -> Any:
        """A cache without tokens."""
        arrays = tuple(
            memory.allocate(mesh, self.spec, self.shape, self.dtype, cache_format) for _ in range(self.num_arrays)
        )
        return arrays[0] if self.is_shared else arrays

    def abstract(self, mesh: Mesh) -> Any:
        """What `allocate` gives, of jax.ShapeDtypeStruct."""
        leaf = jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=NamedSharding(mesh, self.spec))
        return leaf if self.is_shared else (leaf,) * self.num_arrays


def _bitmask(token_ids: tuple[int, ...], num_words: int) -> np.ndarray:
    allowed = np.zeros(num_words * 32, bool)
    allowed[list(token_ids)] = True
    return np.packbits(allowed.reshape(num_words, 4, 8), axis=2, bitorder="little").reshape(-1).view("<u4")
