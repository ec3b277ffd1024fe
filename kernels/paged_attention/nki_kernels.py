"""Paged attention for NeuronCores, in plain NKI: attention of rows of queries, few or a tile of a prompt, and the cache write.

Within what NeuronCore-v2 takes: float32 PSUM, DMA by software descriptors, biases as tiles, loops that are unrolled. Nothing here imports
quire or is decorated: nki.py says how it is called, and `quire.kernels.nki` how it is emulated.

R rows, K key/value heads, H head_dim, S keys, padded to a multiple of 128; L = 2 x K x H numbers that the cache holds of a token:
k0, v0, k1, v1, ... The queries of a key/value head are cut into E lots of at most 128, which hold whole query heads, so that
every lot sees the same keys; Q are the lanes of one, 32, 64 or 128.

A row's keys pass in tiles of up to 512, four gathers of 128 token rows: as many scores per query as one bank of PSUM holds. A tile is
gathered once and its keys are transposed once, whatever the number of lots. The time of VectorE and ScalarE depends on how many keys a
tile has, not on how many of the 128 partitions are in use, so where a head has one small lot those of several heads are stacked on
partitions: P = Q x heads of a group, each head where an instruction may start. Per tile:

    K  [128, H]  --TensorE-->  K^T [H, 512]       per head: H must lie on partitions to be contracted
    q^T [H, Q],  K^T           scores [P, 512]    product per head; mask and exponentials per lot of a group, row sums for free
    w  [P, 512]  --TensorE-->  w^T [128, P] x 4   per lot
    w^T [128, Q], V [128, H]   [P, H]             per head, summed over the four in PSUM; then into the lot's running output

Lengths are numbers of the run, and loops are not: tiles that no query of a row sees are masked, and their keys are not fetched.
"""

# Front ends of NKI parse kernels and are not known to take annotations; and AWS's package, where it is installed, has no types.
# mypy: ignore-errors

import nki.isa as nisa
import nki.language as nl

ROWS = 128  # of one gather: one per partition
BUFFERS = 2  # tiles of keys: one is gathered into while the other is attended to
# Added to the scores of keys that a query does not see. Finite, since a transpose on NeuronCore-v2 multiplies by zeros.
MASKED = -1.0e30


def attention(q, kv_cache, slots, bounds, scale, soft_cap, has_window, gathers_per_tile):
    """Attends each row's queries to its keys, by an online softmax over tiles of them.

    Args:
        q: [R, h, H / h, K * E, Q], not scaled; its dtype is the cache's. A head_dim above 128 is contracted in parts of h.
        kv_cache: [num_blocks, block_size, 2K, H].
        slots: [R, 128, S / 128] int32, the place of key t * 128 + p at [p, t], as block * block_size + offset. A key that no query of
            its row sees has the number of slots, which lies outside and is not fetched: what the cache holds there may be anything.
        bounds: [R, P, 2] float32: each query sees the keys from the first up to but not including the second, the same for every
            head of a group and for every lot; P is Q times min(128 / Q, K), and Q where there are several lots.
        scale: multiplies the scores.
        soft_cap: scores become soft_cap * tanh(scores / soft_cap); 0 for none.
        has_window: whether first bounds are above 0.
        gathers_per_tile: 1 to 4, as SBUF has room.

    Returns: [R, K * E * Q, H] in q's dtype.
    """
    num_rows, part, num_parts, num_lots, num_queries = q.shape
    out = nl.ndarray((num_rows, num_lots * num_queries, part * num_parts), q.dtype, buffer=nl.shared_hbm)
    key_idx = nl.ndarray((bounds.shape[1], ROWS * gathers_per_tile), nl.float32, buffer=nl.sbuf)
    nisa.iota(dst=key_idx, pattern=[[1, ROWS * gathers_per_tile]])
    for row in range(num_rows):
        attend_row(out[row], q[row], kv_cache, slots[row], bounds[row], key_idx, scale, soft_cap, has_window)
    return out


def attend_row(out, q, kv_cache, slots, bounds, key_idx, scale, soft_cap, has_window):
    """One row of `attention`: out [K * E * Q, H], q [h, H / h, K * E, Q], slots [128, S / 128], bounds [P, 2]."""
    gathers_per_tile = key_idx.shape[1] // ROWS
    num_kv_heads, head_dim = kv_cache.shape[2] // 2, kv_cache.shape[3]
    queries, index, limits = load(q), load(slots), load(bounds)
    _, _, num_lots, num_queries = queries.shape
    lanes, num_gathers = limits.shape[0], index.shape[1]
    heads_per_group, lots_per_head = lanes // num_queries, num_lots // num_kv_heads
    num_groups = (num_kv_heads + heads_per_group - 1) // heads_per_group
    num_states = num_groups * lots_per_head
    buffers = cleared_buffers(kv_cache, queries.dtype, gathers_per_tile)
    neg_max = nl.ndarray((lanes, num_states), nl.float32, buffer=nl.sbuf)
    total = nl.ndarray((lanes, num_states), nl.float32, buffer=nl.sbuf)
    acc = nl.ndarray((lanes, num_states, head_dim), nl.float32, buffer=nl.sbuf)
    for first in range(0, num_gathers, gathers_per_tile):
        size = min(gathers_per_tile, num_gathers - first)
        kv = buffers[:, (first // gathers_per_tile) % BUFFERS, 0:size]
        gather(kv, kv_cache, index, first)
        bias = mask(key_idx[:, 0 : size * ROWS], limits, first * ROWS, has_window)
        for group in range(num_groups):
            first_head = group * heads_per_group
            num_heads = min(heads_per_group, num_kv_heads - first_head)
            used = num_heads * num_queries
            keys_t = transposed_keys(kv, first_head, num_heads, queries.shape[0], queries.shape[1])
            for lot in range(lots_per_head):
                state = group * lots_per_head + lot
                # Several heads are stacked only where each has one lot, so that either the heads or the lots are several.
                first_lot = first_head * lots_per_head + lot
                scores = masked_scores(queries, keys_t, first_lot, bias[0:used], scale, soft_cap)
                online_softmax_step(
                    scores,
                    kv,
                    first_head,
                    num_queries,
                    first == 0,
                    neg_max[0:used, state : state + 1],
                    total[0:used, state : state + 1],
                    acc[0:used, state, :],
                )
    for state in range(num_states):
        first_lane = state * lanes
        used = min(lanes, num_lots * num_queries - first_lane)
        store(out[first_lane : first_lane + used, :], total[0:used, state : state + 1], acc[0:used, state, :])


def load(x):
    """A tile of the same shape in SBUF. Rows are contiguous in HBM: XLA laid them out so."""
    tile = nl.ndarray(x.shape, x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    return tile


def cleared_buffers(kv_cache, dtype, gathers_per_tile):
    """[128, 2, gathers, 2K, H] of zeros. Rows that are not gathered keep what was there: zeros, or finite keys of the same request
    that its mask leaves out. Buffers that outlived a row would let one request's NaN reach another.

    ScalarE writes the zeros, since VectorE, which memset would take, has more to do.
    """
    _, _, num_heads, head_dim = kv_cache.shape
    zero = nl.ndarray((ROWS, 1), nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=zero, value=0.0)
    size = BUFFERS * gathers_per_tile * num_heads * head_dim
    buffers = nl.ndarray((ROWS, size), dtype, buffer=nl.sbuf)
    nisa.activation(dst=buffers, op=nl.copy, data=zero.broadcast(1, size))
    return buffers.reshape((ROWS, BUFFERS, gathers_per_tile, num_heads, head_dim))


def gather(kv, kv_cache, index, first):
    """Token rows into kv [128, gathers, 2K, H], from gather `first` of the row on; keys that nobody sees are skipped."""
    num_blocks, block_size, num_heads, head_dim = kv_cache.shape
    width = num_heads * head_dim
    table = kv_cache.reshape((num_blocks * block_size, width))
    for i in range(kv.shape[1]):
        rows = table.ap(
            pattern=[[width, ROWS], [1, width]], vector_offset=index[:, first + i : first + i + 1], indirect_dim=0
        )
        nisa.dma_copy(dst=kv[:, i], src=rows, oob_mode=nisa.oob_mode.skip)


def mask(key_idx, limits, start, has_window):
    """[P, keys] float32: 0 where a query sees a key, MASKED elsewhere, for the keys from `start` on; key_idx counts from 0."""
    lanes = key_idx.shape[0]
    local = nl.ndarray((lanes, 2), nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=local, data=limits, op0=nl.subtract, operand0=float(start))
    bias = nl.ndarray(key_idx.shape, nl.float32, buffer=nl.sbuf)
    if has_window:
        seen = nl.ndarray(key_idx.shape, nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=seen, data=key_idx, op0=nl.less, operand0=local[:, 1:2])
        nisa.scalar_tensor_tensor(
            dst=seen, data=key_idx, op0=nl.greater_equal, operand0=local[:, 0:1], op1=nl.multiply, operand1=seen
        )
        nisa.tensor_scalar(dst=bias, data=seen, op0=nl.subtract, operand0=1.0, op1=nl.multiply, operand1=-MASKED)
    else:
        nisa.tensor_scalar(
            dst=bias, data=key_idx, op0=nl.greater_equal, operand0=local[:, 1:2], op1=nl.multiply, operand1=MASKED
        )
    return bias


def transposed_dtype(dtype):
    """NeuronCore-v2 transposes by a matmul, which writes float32; later ones keep the dtype."""
    return nl.float32 if nisa.get_nc_version() == nisa.nc_version.gen2 else dtype


def transposed_keys(kv, first_head, num_heads, part, num_parts):
    """[h, H / h, heads, keys] in the cache's dtype. ScalarE copies them out of PSUM, as VectorE has more to do."""
    num_keys = kv.shape[1] * ROWS
    keys_t = nl.ndarray((part, num_parts, num_heads, num_keys), kv.dtype, buffer=nl.sbuf)
    for head in range(num_heads):
        for i in range(num_parts):
            in_psum = nl.ndarray((part, num_keys), transposed_dtype(kv.dtype), buffer=nl.psum)
            for j in range(kv.shape[1]):
                nisa.nc_transpose(
                    dst=in_psum[:, j * ROWS : (j + 1) * ROWS],
                    data=kv[:, j, 2 * (first_head + head), i * part : (i + 1) * part],
                    engine=nisa.engine.tensor,
                )
            nisa.activation(dst=keys_t[:, i, head, :], op=nl.copy, data=in_psum)
    return keys_t


def masked_scores(queries, keys_t, first_lot, bias, scale, soft_cap):
    """[P, keys] float32 of one lot of each head of a group; the first head's is lot `first_lot` of the row."""
    _, num_parts, num_heads, num_keys = keys_t.shape
    num_queries = queries.shape[3]
    lanes = bias.shape[0]
    product = nl.ndarray((lanes, num_keys), nl.float32, buffer=nl.psum)
    for head in range(num_heads):
        for i in range(num_parts):
            nisa.nc_matmul(
                dst=product[head * num_queries : (head + 1) * num_queries, :],
                stationary=queries[:, i, first_lot + head, :],
                moving=keys_t[:, i, head, :],
                accumulate=i > 0,
            )
    scores = nl.ndarray((lanes, num_keys), nl.float32, buffer=nl.sbuf)
    if soft_cap == 0:
        nisa.scalar_tensor_tensor(dst=scores, data=product, op0=nl.multiply, operand0=scale, op1=nl.add, operand1=bias)
    else:
        capped = nl.ndarray((lanes, num_keys), nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=capped, op=nl.tanh, data=product, scale=scale / soft_cap)
        nisa.scalar_tensor_tensor(
            dst=scores, data=capped, op0=nl.multiply, operand0=soft_cap, op1=nl.add, operand1=bias
        )
    return scores


def online_softmax_step(scores, kv, first_head, num_queries, is_first, neg_max, total, acc):
    """Takes a tile's scores [P, keys] into a lot's running maximum (negated, as exp's bias wants it), sum and output [P, H]."""
    lanes = scores.shape[0]
    tile_max = nl.ndarray((lanes, 1), nl.float32, buffer=nl.sbuf)
    tile_total = nl.ndarray((lanes, 1), nl.float32, buffer=nl.sbuf)
    correction = nl.ndarray((lanes, 1), nl.float32, buffer=nl.sbuf)
    weights = nl.ndarray(scores.shape, kv.dtype, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=tile_max, op=nl.maximum, data=scores, axis=1, negate=True)
    if not is_first:
        nisa.tensor_tensor(dst=tile_max, data1=tile_max, data2=neg_max, op=nl.minimum)
        nisa.activation(dst=correction, op=nl.exp, data=neg_max, scale=-1.0, bias=tile_max)
    nisa.tensor_copy(dst=neg_max, src=tile_max)
    nisa.activation(
        dst=weights,
        op=nl.exp,
        data=scores,
        bias=tile_max,
        reduce_op=nl.add,
        reduce_res=tile_total,
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )
    output = weighted_values(weights, kv, first_head, num_queries)
    add_corrected(total, tile_total, correction, is_first)
    add_corrected(acc, output, correction, is_first)


def add_corrected(running, new, correction, is_first):
    """running * correction + new; there is nothing to correct at first."""
    if is_first:
        nisa.tensor_copy(dst=running, src=new)
    else:
        nisa.scalar_tensor_tensor(
            dst=running, data=running, op0=nl.multiply, operand0=correction, op1=nl.add, operand1=new
        )


def weighted_values(weights, kv, first_head, num_queries):
    """[P, H] float32 in PSUM: the weights [P, keys] transposed, times the values of each head."""
    lanes = weights.shape[0]
    _, num_gathers, _, head_dim = kv.shape
    in_psum = nl.ndarray((ROWS, num_gathers, lanes), transposed_dtype(kv.dtype), buffer=nl.psum)
    for j in range(num_gathers):
        nisa.nc_transpose(dst=in_psum[:, j, :], data=weights[:, j * ROWS : (j + 1) * ROWS], engine=nisa.engine.tensor)
    weights_t = nl.ndarray((ROWS, num_gathers, lanes), kv.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=weights_t, src=in_psum)
    output = nl.ndarray((lanes, head_dim), nl.float32, buffer=nl.psum)
    for i in range(lanes // num_queries):
        for j in range(num_gathers):
            nisa.nc_matmul(
                dst=output[i * num_queries : (i + 1) * num_queries, :],
                stationary=weights_t[:, j, i * num_queries : (i + 1) * num_queries],
                moving=kv[:, j, 2 * (first_head + i) + 1, :],
                accumulate=j > 0,
            )
    return output


def store(out, total, acc):
    """Divides a lot's output [P, H] by its sums and writes it. A sum is 1 at least: it holds the weight of the maximum."""
    inverse = nl.ndarray(total.shape, nl.float32, buffer=nl.sbuf)
    nisa.reciprocal(dst=inverse, data=total)
    result = nl.ndarray(acc.shape, out.dtype, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=result, data=acc, op0=nl.multiply, operand0=inverse)
    nisa.dma_copy(dst=out, src=result)


def write_kv(kv_cache, kv_new, slots):
    """Scatters token rows into the cache, which is returned and so updated in place.

    Args:
        kv_cache: [num_blocks, block_size, 2K, H].
        kv_new: [T, L], in the cache's dtype.
        slots: [T] int32, all different; those of padding lie outside and are not written.
    """
    num_tokens, width = kv_new.shape
    table = kv_cache.reshape((kv_cache.shape[0] * kv_cache.shape[1], width))
    for start in range(0, num_tokens, ROWS):
        num_rows = min(ROWS, num_tokens - start)
        index = nl.ndarray((num_rows, 1), slots.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=index, src=slots.ap(pattern=[[1, num_rows], [1, 1]], offset=start))
        rows = nl.ndarray((num_rows, width), kv_new.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=rows, src=kv_new[start : start + num_rows, :])
        places = table.ap(pattern=[[width, num_rows], [1, width]], vector_offset=index, indirect_dim=0)
        nisa.dma_copy(dst=places, src=rows, oob_mode=nisa.oob_mode.skip)
    return kv_cache
