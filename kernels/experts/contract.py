"""The contract of the experts op: tokens through the gated MLPs that a router chose for them.

T tokens, D hidden size, E experts that are held here, F width of one expert, k experts per token.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax

from quire.kernels.linear.contract import Weight


class RunExperts(Protocol):
    """Sums over a token's experts are taken in float32."""

    def __call__(
        self,
        x: jax.Array,
        ids: jax.Array,
        weights: jax.Array,
        matrices: tuple[jax.Array | Weight | Any, ...],
        *,
        activate: Any,
    ) -> jax.Array:
        """Each token's weighted sum of down(activate(gate(x)) * up(x)) over its experts, float32 [T, D].

        Args:
            x: [T, D].
            ids: [T, k] int32, the experts of each token; those outside [0, E) are held elsewhere and count nothing here.
            weights: [T, k] float32.
            matrices: gate and up [E, D, F], down [E, F, D], as the linear op prepared them.
            activate: elementwise on float32, in its own dtype.
        """
        ...
