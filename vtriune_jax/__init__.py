"""vtriune_jax: reinforcement learning of Qwen2.5-VL on visual reasoning and perception, in JAX."""

import os

# Transformers would say, when it is imported, that it misses torch: nothing here does.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
