"""What the Flax modules of both APIs, `jaxflash.linen` and `jaxflash.nnx`, have in common."""
