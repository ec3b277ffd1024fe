"""Attention over a KV cache kept in blocks, addressed through block tables."""
