"""Mosaic GPU kernels for Hopper (sm_90a)."""

from pallas_kernels.hopper.backward import backward, supports_backward
from pallas_kernels.hopper.backward_kernel import BackwardConfig
from pallas_kernels.hopper.config import Config
from pallas_kernels.hopper.decode import decode, decode_config, supports_decode
from pallas_kernels.hopper.gpu import multiprocessors
from pallas_kernels.hopper.launch import forward, supports
from pallas_kernels.hopper.quantize import quantize, rounds_queries, supports_quantize
from pallas_kernels.mosaic import is_interpreting

__all__ = [
    "BackwardConfig",
    "Config",
    "backward",
    "decode",
    "decode_config",
    "forward",
    "is_interpreting",
    "multiprocessors",
    "quantize",
    "rounds_queries",
    "supports",
    "supports_backward",
    "supports_decode",
    "supports_quantize",
]
