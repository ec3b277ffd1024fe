"""Paged attention for NeuronCores, in plain NKI: attention of a few queries per row, and the cache write.

Within what NeuronCore-v2 takes: float32 PSUM, DMA by software descriptors, biases as tiles, loops that are unrolled. Nothing here imports
quire or is decorated: nki.py says how it is called, and `quire.kernels.nki` how it is emulated.

R rows, K key/value heads, Q = G x W queries per key/value head (G query heads of W tokens each, the head outermost), H head_dim,
S keys, padded to a multiple of 128; L = 2 x K x H numbers that the cache holds of a token: k0, v0, k1, v1, ...

A row's keys pass in tiles of up to 512, four gathers of 128 token rows: as many scores per query as one bank of PSUM holds.
Per tile and head:

    K  [128, H]  --TensorE-->  K^T [H, 512]       transposed, since H must lie on partitions to be contracted
    q^T [H, Q],  K^T           scores [Q, 512]    masked, then their exponentials, with row sums from ScalarE for free
    P  [Q, 512]  --TensorE-->  P^T [128, Q] x 4
    P^T, V [128, H]            [Q, H]             summed over the four in PSUM, then into the running output
"""

# Front ends of NKI parse kernels and are not known to take annotations; and AWS's package, where it is installed, has no types.
# mypy: ignore-errors

import nki.isa as nisa
import nki.language as nl

ROWS = 128  # of one gather: one per partition
GATHERS = 4  # of one tile


def decode_attention(q, kv_cache, slots, mask, scale, soft_cap):
    """Attends each row's queries to its keys, by an online softmax over tiles of them.

    Args:
        q: [R, K, H, Q], not scaled; its dtype is the cache's.
        kv_cache: [num_blocks, block_size, 2K, H].
        slots: [R, S] int32, the place of each key as block * block_size + offset. A key that no query of its row sees has the number of
            slots, which lies outside and is not fetched: what the cache holds there may be anything, NaN included.
        mask: [R, W, S] float32, added to the scores: 0, or a large negative number, finite.
        scale: multiplies the scores.
        soft_cap: scores become soft_cap * tanh(scores / soft_cap); 0 for none.

    Returns: [R, K, Q, H] in q's dtype.
    """
    num_rows, num_kv_heads, head_dim, num_queries = q.shape
    num_keys = slots.shape[1]
    out = nl.ndarray((num_rows, num_kv_heads, num_queries, head_dim), q.dtype, buffer=nl.shared_hbm)
    for row in range(num_rows):
        queries = load_queries(q, row)
        index = load_index(slots, row)
        neg_max = nl.ndarray((num_queries, num_kv_heads), nl.float32, buffer=nl.sbuf)
        total = nl.ndarray((num_queries, num_kv_heads), nl.float32, buffer=nl.sbuf)
        acc = nl.ndarray((num_queries, num_kv_heads, head_dim), nl.float32, buffer=nl.sbuf)
        for start in range(0, num_keys, ROWS * GATHERS):
            num_gathers = min(GATHERS, (num_keys - start) // ROWS)
            kv = gather(kv_cache, index, start // ROWS, num_gathers, q.dtype)
            bias = load_mask(mask, row, start, num_gathers * ROWS, num_queries)
            for head in range(num_kv_heads):
                keys_t = transposed_keys(kv, head, queries.shape[0], queries.shape[1])
                scores = masked_scores(queries, keys_t, head, bias, scale, soft_cap)
                online_softmax_step(scores, kv, head, start == 0, neg_max, total, acc)
        store(out, row, total, acc)
    return out


def load_queries(q, row):
    """[h, H / h, K, Q] of q [R, K, H, Q]: a head_dim above 128 is contracted in parts of h."""
    _, num_kv_heads, head_dim, num_queries = q.shape
    num_parts = (head_dim + ROWS - 1) // ROWS
    part = head_dim // num_parts
    queries = nl.ndarray((part, num_parts, num_kv_heads, num_queries), q.dtype, buffer=nl.sbuf)
    pattern = [
        [num_queries, part],
        [part * num_queries, num_parts],
        [head_dim * num_queries, num_kv_heads],
        [1, num_queries],
    ]
    nisa.dma_copy(dst=queries, src=q.ap(pattern=pattern, offset=row * num_kv_heads * head_dim * num_queries))
    return queries


def load_index(slots, row):
    """[128, S / 128] int32: key t * 128 + p of the row at [p, t]."""
    num_keys = slots.shape[1]
    num_gathers = num_keys // ROWS
    index = nl.ndarray((ROWS, num_gathers), slots.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=index, src=slots.ap(pattern=[[1, ROWS], [ROWS, num_gathers]], offset=row * num_keys))
    return index


def gather(kv_cache, index, first, num_gathers, dtype):
    """[128, num_gathers, L]: token rows, zeros where the row has no key. Zeros first, since a skipped row is left as it was."""
    num_blocks, block_size, num_heads, head_dim = kv_cache.shape
    width = num_heads * head_dim
    table = kv_cache.reshape((num_blocks * block_size, width))
    kv = nl.ndarray((ROWS, num_gathers, width), dtype, buffer=nl.sbuf)
    nisa.memset(dst=kv, value=0.0)
    for i in range(num_gathers):
        rows = table.ap(
            pattern=[[width, ROWS], [1, width]], vector_offset=index[:, first + i : first + i + 1], indirect_dim=0
        )
        nisa.dma_copy(dst=kv[:, i, :], src=rows, oob_mode=nisa.oob_mode.skip)
    return kv.reshape((ROWS, num_gathers, num_heads, head_dim))


def load_mask(mask, row, start, num_keys, num_queries):
    """[Q, num_keys] float32: the mask of the W tokens once for each of the G heads."""
    _, width, row_size = mask.shape
    bias = nl.ndarray((num_queries, num_keys), nl.float32, buffer=nl.sbuf)
    pattern = [[0, num_queries // width], [row_size, width], [1, num_keys]]
    nisa.dma_copy(dst=bias, src=mask.ap(pattern=pattern, offset=row * width * row_size + start))
    return bias


def transposed_dtype(dtype):
    """NeuronCore-v2 transposes by a matmul, which writes float32; later ones keep the dtype."""
    return nl.float32 if nisa.get_nc_version() == nisa.nc_version.gen2 else dtype


def transposed_keys(kv, head, part, num_parts):
    """[h, H / h, keys] of one head, in the cache's dtype."""
    num_gathers = kv.shape[1]
    num_keys = num_gathers * ROWS
    keys_t = nl.ndarray((part, num_parts, num_keys), kv.dtype, buffer=nl.sbuf)
    for i in range(num_parts):
        in_psum = nl.ndarray((part, num_keys), transposed_dtype(kv.dtype), buffer=nl.psum)
        for j in range(num_gathers):
            nisa.nc_transpose(
                dst=in_psum[:, j * ROWS : (j + 1) * ROWS],
                data=kv[:, j, 2 * head, i * part : (i + 1) * part],
                engine=nisa.engine.tensor,
            )
        nisa.tensor_copy(dst=keys_t[:, i, :], src=in_psum)
    return keys_t


def masked_scores(queries, keys_t, head, bias, scale, soft_cap):
    """[Q, keys] float32."""
    num_queries, num_keys = bias.shape
    product = nl.ndarray((num_queries, num_keys), nl.float32, buffer=nl.psum)
    for i in range(queries.shape[1]):
        nisa.nc_matmul(dst=product, stationary=queries[:, i, head, :], moving=keys_t[:, i, :], accumulate=i > 0)
    scores = nl.ndarray((num_queries, num_keys), nl.float32, buffer=nl.sbuf)
    if soft_cap == 0:
        nisa.scalar_tensor_tensor(dst=scores, data=product, op0=nl.multiply, operand0=scale, op1=nl.add, operand1=bias)
    else:
        capped = nl.ndarray((num_queries, num_keys), nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=capped, op=nl.tanh, data=product, scale=scale / soft_cap)
        nisa.scalar_tensor_tensor(
            dst=scores, data=capped, op0=nl.multiply, operand0=soft_cap, op1=nl.add, operand1=bias
        )
    return scores


def online_softmax_step(scores, kv, head, is_first, neg_max, total, acc):
    """Takes one tile's scores [Q, keys] into a head's running maximum (negated, as exp's bias wants it), sum and output."""
    num_queries, num_keys = scores.shape
    tile_max = nl.ndarray((num_queries, 1), nl.float32, buffer=nl.sbuf)
    tile_total = nl.ndarray((num_queries, 1), nl.float32, buffer=nl.sbuf)
    correction = nl.ndarray((num_queries, 1), nl.float32, buffer=nl.sbuf)
    weights = nl.ndarray((num_queries, num_keys), kv.dtype, buffer=nl.sbuf)
    old_max = neg_max[:, head : head + 1]
    nisa.tensor_reduce(dst=tile_max, op=nl.maximum, data=scores, axis=1, negate=True)
    if not is_first:
        nisa.tensor_tensor(dst=tile_max, data1=tile_max, data2=old_max, op=nl.minimum)
        nisa.activation(dst=correction, op=nl.exp, data=old_max, scale=-1.0, bias=tile_max)
    nisa.tensor_copy(dst=old_max, src=tile_max)
    nisa.activation(
        dst=weights,
        op=nl.exp,
        data=scores,
        bias=tile_max,
        reduce_op=nl.add,
        reduce_res=tile_total,
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )
    output = weighted_values(weights, kv, head)
    add_corrected(total[:, head : head + 1], tile_total, correction, is_first)
    add_corrected(acc[:, head, :], output, correction, is_first)


def add_corrected(running, new, correction, is_first):
    """running * correction + new; there is nothing to correct at first."""
    if is_first:
        nisa.tensor_copy(dst=running, src=new)
    else:
        nisa.scalar_tensor_tensor(
            dst=running, data=running, op0=nl.multiply, operand0=correction, op1=nl.add, operand1=new
        )


def weighted_values(weights, kv, head):
    """[Q, H] float32 in PSUM: the weights [Q, keys] transposed, times the values."""
    num_queries = weights.shape[0]
    _, num_gathers, _, head_dim = kv.shape
    in_psum = nl.ndarray((ROWS, num_gathers, num_queries), transposed_dtype(kv.dtype), buffer=nl.psum)
    for j in range(num_gathers):
        nisa.nc_transpose(dst=in_psum[:, j, :], data=weights[:, j * ROWS : (j + 1) * ROWS], engine=nisa.engine.tensor)
    weights_t = nl.ndarray((ROWS, num_gathers, num_queries), kv.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=weights_t, src=in_psum)
    output = nl.ndarray((num_queries, head_dim), nl.float32, buffer=nl.psum)
    for j in range(num_gathers):
        nisa.nc_matmul(dst=output, stationary=weights_t[:, j, :], moving=kv[:, j, 2 * head + 1, :], accumulate=j > 0)
    return output


def store(out, row, total, acc):
    """Divides by the sums and writes a row's [K, Q, H]. A sum is 1 at least: it holds the weight of the maximum."""
    num_queries, num_kv_heads, head_dim = acc.shape
    inverse = nl.ndarray((num_queries, num_kv_heads), nl.float32, buffer=nl.sbuf)
    nisa.reciprocal(dst=inverse, data=total)
    for head in range(num_kv_heads):
        result = nl.ndarray((num_queries, head_dim), out.dtype, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=result, data=acc[:, head, :], op0=nl.multiply, operand0=inverse[:, head : head + 1])
        nisa.dma_copy(dst=out[row, head], src=result)


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
