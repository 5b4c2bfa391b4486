"""The language every backend speaks: bands, masks, scores, softmax, dropout, tiles, problems."""

from pallas_kernels.spec import dropout, mask, narrow, quantization, score, softmax
from pallas_kernels.spec.band import Band
from pallas_kernels.spec.blocks import Tiles, coverage, visible_tiles
from pallas_kernels.spec.problem import (
    AXES,
    AXES_OF_PAGES,
    Device,
    ElementFunction,
    Operands,
    Problem,
    extent,
    gradients,
)
from pallas_kernels.spec.tile import ScoreParameters, Tile, tile_of, window_of

__all__ = [
    "AXES",
    "AXES_OF_PAGES",
    "Band",
    "Device",
    "ElementFunction",
    "Operands",
    "Problem",
    "ScoreParameters",
    "Tile",
    "Tiles",
    "coverage",
    "dropout",
    "extent",
    "gradients",
    "mask",
    "narrow",
    "quantization",
    "score",
    "softmax",
    "tile_of",
    "visible_tiles",
    "window_of",
]
