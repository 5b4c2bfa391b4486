"""Mosaic GPU kernels for Hopper (sm_90a)."""

from pallas_kernels.hopper.forward import Config, forward, supports

__all__ = ["Config", "forward", "supports"]
