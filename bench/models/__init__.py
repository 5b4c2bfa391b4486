"""Real models with random weights: Llama 2, GPT-2, GPT-J, GPT-NeoX, in flax.nnx."""
