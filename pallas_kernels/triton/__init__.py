"""Pallas-Triton kernels for NVIDIA GPUs from compute capability 8.0 on.

FlashAttention-2 (Dao 2023): a program for each tile of queries, in the backward one for each tile
of keys and one for each tile of queries. JAX has deprecated Pallas-Triton: of the library
`jaxflash.portable` alone knows of this folder, and does without it where it cannot be imported.
"""

from pallas_kernels.triton.backward import backward, supports_backward
from pallas_kernels.triton.config import BackwardConfig, Config, backward_config, forward_config
from pallas_kernels.triton.decode import decode, supports_decode
from pallas_kernels.triton.forward import forward, supports
from pallas_kernels.triton.memory import interpreting

__all__ = [
    "BackwardConfig",
    "Config",
    "backward",
    "backward_config",
    "decode",
    "forward",
    "forward_config",
    "interpreting",
    "supports",
    "supports_backward",
    "supports_decode",
]
