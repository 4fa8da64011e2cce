"""Rewards as numerical operations: padded, masked, batched arrays in, numbers out; all jit-able.

Nothing here knows of text, JSON or HTTP: `vtriune_jax.verifiers` turns completions into arrays.
"""
