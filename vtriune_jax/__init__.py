"""vtriune_jax: reinforcement learning of Qwen2.5-VL on visual reasoning and perception, in JAX."""
