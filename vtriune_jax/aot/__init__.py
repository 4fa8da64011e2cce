"""What `vtriune_jax.compile` needs: devices that are not here, and what programs cost."""
