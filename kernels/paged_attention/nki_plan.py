"""How a call of attention is cut for the NKI kernels: into pieces of rows, lots of queries and tiles of keys that SBUF has room for.

W queries per row, N query heads, K key/value heads, G = N / K, H head_dim; E and Q as in nki_kernels.py.
"""

from __future__ import annotations

from dataclasses import dataclass

KEYS_PER_GATHER = 128
MAX_LANES = 128  # queries of a lot: they lie on partitions
MAX_GATHERS = 4  # of a tile: 512 float32 scores are a bank of PSUM
# Of the 192 KiB per partition that NeuronCore-v2 has, and later ones more; the rest is left to the compiler.
SBUF_BYTES = 180 * 1024
FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Model:
    """What a plan needs to know of a model, or of a device's part of it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    item_bytes: int
    """Of one number of the cache."""

    @property
    def group(self) -> int:
        """G: query heads per key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_parts(self) -> int:
        """In how many products a head_dim is contracted."""
        return -(-self.head_dim // 128)

    @property
    def token_bytes(self) -> int:
        """Of a token's keys and values."""
        return 2 * self.num_kv_heads * self.head_dim * self.item_bytes


@dataclass(frozen=True)
class Plan:
    """The cut: every row into pieces of `width` queries, of which a lot holds those of `heads_per_lot` query heads."""

    model: Model
    num_pieces: int
    width: int
    gathers_per_tile: int
    num_keys: int

    @property
    def heads_per_lot(self) -> int:
        return min(self.model.group, MAX_LANES // self.width)

    @property
    def lots_per_head(self) -> int:
        """E."""
        return -(-self.model.group // self.heads_per_lot)

    @property
    def num_lots(self) -> int:
        return self.model.num_kv_heads * self.lots_per_head

    @property
    def lane(self) -> int:
        """Q: partitions that a lot takes, so that the next head's start where an instruction may."""
        return next(lane for lane in (32, 64, 128) if lane >= self.heads_per_lot * self.width)

    @property
    def kv_heads_per_group(self) -> int:
        """Heads stacked on partitions. Only single lots are: where a head has several, each takes more than 64 lanes."""
        return min(MAX_LANES // self.lane, self.model.num_kv_heads)

    @property
    def sbuf_bytes(self) -> int:
        """Of each partition, with two of whatever is made again for each tile, group or lot, so that they can overlap."""
        model, keys = self.model, self.gathers_per_tile * KEYS_PER_GATHER
        lanes = self.lane * self.kv_heads_per_group
        buffers = 2 * self.gathers_per_tile * model.token_bytes
        queries = model.num_parts * self.num_lots * self.lane * model.item_bytes
        index = (self.num_keys // KEYS_PER_GATHER) * FLOAT32_BYTES
        key_idx_and_bias = (1 + 2 * 2) * keys * FLOAT32_BYTES
        keys_t = 2 * model.num_parts * self.kv_heads_per_group * keys * model.item_bytes
        scores = 2 * 2 * keys * FLOAT32_BYTES
        weights = 2 * (keys + self.gathers_per_tile * lanes) * model.item_bytes
        num_states = -(-model.num_kv_heads // self.kv_heads_per_group) * self.lots_per_head
        states = num_states * (2 + model.head_dim) * FLOAT32_BYTES
        result = 2 * model.head_dim * model.item_bytes
        return buffers + queries + index + key_idx_and_bias + keys_t + scores + weights + states + result


def plan_for(model: Model, width: int, num_keys: int) -> Plan | None:
    """The plan with the fewest pieces, as each fetches its row's keys anew, then with the largest tiles; None where none fits.

    Args:
        width: W, queries of a row, at least 1.
        num_keys: S, of a row, a multiple of 128.
    """
    num_pieces = -(-width // MAX_LANES)
    while num_pieces <= width:
        for gathers in range(MAX_GATHERS, 0, -1):
            plan = Plan(model, num_pieces, -(-width // num_pieces), gathers, num_keys)
            if plan.sbuf_bytes <= SBUF_BYTES:
                return plan
        num_pieces = min(2 * num_pieces, width) if num_pieces < width else width + 1
    return None


def round_up(number: int, multiple: int) -> int:
    """The first multiple that is not below a number."""
    return -(-number // multiple) * multiple
