"""Mosaic GPU kernels for Hopper (sm_90a)."""

from pallas_kernels.hopper.config import Config
from pallas_kernels.hopper.forward import forward, supports

__all__ = ["Config", "forward", "supports"]
