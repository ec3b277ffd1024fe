"""A kernel in plain NKI, as the emulator and AWS's package both take it."""

import nki.isa as nisa
import nki.language as nl


def exp_of_product(x, w):
    """[M, N] float32: exp(x^T w) of x [K, M] and w [K, N]."""
    x_tile = nl.ndarray(x.shape, x.dtype, buffer=nl.sbuf)
    w_tile = nl.ndarray(w.shape, w.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=x_tile, src=x)
    nisa.dma_copy(dst=w_tile, src=w)
    product = nl.ndarray((x.shape[1], w.shape[1]), nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=product, stationary=x_tile, moving=w_tile)
    result = nl.ndarray(product.shape, nl.float32, buffer=nl.sbuf)
    nisa.activation(dst=result, op=nl.exp, data=product)
    out = nl.ndarray(product.shape, nl.float32, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=result)
    return out
