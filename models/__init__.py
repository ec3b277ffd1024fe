"""Models: pure functions over parameter trees, and the way from a checkpoint to them.

`registry.load_config` -> `checkpoint.load_params` -> `decoder.forward`, `decoder.compute_logits`.
"""
