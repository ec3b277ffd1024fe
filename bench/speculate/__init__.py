"""`quire bench speculate`: what speculative decoding gains, beside the same engine without it, and what drafting in the step itself saves."""
