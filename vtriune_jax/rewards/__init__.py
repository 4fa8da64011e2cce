"""Rewards as numerical operations: padded, masked, batched arrays in, numbers out; all jit-able.

Every operation takes a batch in its leading axes, and arrays of NumPy as well as of JAX: `arrays`
says how. Nothing here knows of text, JSON or HTTP: `vtriune_jax.verifiers` turns completions into
arrays.
"""
