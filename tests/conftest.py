"""Strict JAX settings for every test: no implicit dtype or rank promotion, float32 matmuls that are float32."""

import os
import signal
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Workers, and the next run, share what they compile.
os.environ.setdefault("QUIRE_CACHE", str(Path(__file__).parent.parent / ".pytest_cache" / "quire"))

import jax
from hypothesis import settings

# A shell that starts the tests in its background has them, and all that they start, ignore interrupts, which some are about.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

settings.register_profile("quire", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("quire")
