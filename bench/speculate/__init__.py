"""`quire bench speculate`: what speculative decoding gains over the same engine without it, and what drafting in the step saves."""
