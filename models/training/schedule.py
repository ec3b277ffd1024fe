"""How the run spends its time: learning rate and row length as functions of the share of the time gone, 0 to 1."""

WARM_UP, DECAY_FROM = 0.02, 0.35
PHASES = ((0.0, 256), (0.35, 512), (0.88, 1024))
"""(share of the time gone, tokens of a row): long rows are dear, so they come last."""


def learning_rate_factor(share: float) -> float:
    """Rises to 1 during the warm-up, stays, then falls linearly to 0 when the time is up."""
    return max(0.0, min(1.0, share / WARM_UP, (1.0 - share) / (1.0 - DECAY_FROM)))


def row_length(share: float) -> int:
    """Tokens of a training row at this share of the time."""
    return max(length for start, length in PHASES if share >= start)
