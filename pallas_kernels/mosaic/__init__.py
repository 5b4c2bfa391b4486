"""The only place that meets Mosaic GPU's API and its differences between JAX versions.

A kernel written against this package runs compiled on a Hopper GPU and, unchanged, on a CPU under
``with interpreting():``, where every data race that the interpreter can see raises `RaceError`.
The interpreter lacks layouts and code inlined into a kernel; the helpers here choose, while the
kernel is traced, between the instruction and an emulation of it.

What the interpreter cannot show: its matrix products are synchronous, so a value read before its
``wgmma`` has finished, or a tile overwritten under a running one, looks right there. Only runs on
a GPU, repeated bit for bit, catch those.
"""

# Alike on every JAX version and in both modes; offered here so that kernels import one package.
from jax.experimental.pallas.mosaic_gpu import (
    SMEM,
    Barrier,
    Layout,
    barrier_arrive,
    barrier_wait,
    commit_smem,
    copy_gmem_to_smem,
    copy_smem_to_gmem,
    set_max_registers,
    wait_smem_to_gmem,
)

from pallas_kernels.mosaic.atomic import count_up, counter, counters, take_number, wait_count
from pallas_kernels.mosaic.gather import gather
from pallas_kernels.mosaic.growth import excess, grown, scaled_rows
from pallas_kernels.mosaic.interpreter import RaceError, interpreting, is_interpreting
from pallas_kernels.mosaic.launch import compiler_params, kernel
from pallas_kernels.mosaic.matmul import (
    as_left_operand,
    matmul,
    settle,
    start,
    start_columns,
    start_turned,
)
from pallas_kernels.mosaic.matrix import (
    Form,
    Matrix,
    View,
    copied_columns,
    copy_in,
    copy_out,
    copy_rows_in,
    smem_of_two,
)
from pallas_kernels.mosaic.memory import Ref, load, store, tiled_smem
from pallas_kernels.mosaic.narrow import NARROWED_NUMBERS, narrow_rows
from pallas_kernels.mosaic.numbers import copy_number_in, wait_numbers
from pallas_kernels.mosaic.ordered import store_for_widened_rows, store_from_widened_columns
from pallas_kernels.mosaic.rows import store_rows
from pallas_kernels.mosaic.squares import store_operand, store_turned
from pallas_kernels.mosaic.sums import (
    PART_WIDTH,
    Sums,
    add,
    add_staged,
    load_part,
    matrices,
    put,
    stage,
)
from pallas_kernels.mosaic.values import (
    FOLDED,
    fold_parts,
    full,
    iota,
    kept_rows,
    load_columns,
    load_matrix,
    load_rows,
    opaque,
    spread_columns,
    spread_parts,
    spread_rows,
    uniform,
    vector_iota,
)
from pallas_kernels.mosaic.widen import (
    WIDENED_COLUMNS,
    widened_columns,
    widened_rows,
)

__all__ = [
    "FOLDED",
    "NARROWED_NUMBERS",
    "PART_WIDTH",
    "SMEM",
    "WIDENED_COLUMNS",
    "Barrier",
    "Form",
    "Layout",
    "Matrix",
    "RaceError",
    "Ref",
    "Sums",
    "View",
    "add",
    "add_staged",
    "as_left_operand",
    "barrier_arrive",
    "barrier_wait",
    "commit_smem",
    "compiler_params",
    "copied_columns",
    "copy_gmem_to_smem",
    "copy_in",
    "copy_number_in",
    "copy_out",
    "copy_rows_in",
    "copy_smem_to_gmem",
    "count_up",
    "counter",
    "counters",
    "excess",
    "fold_parts",
    "full",
    "gather",
    "grown",
    "interpreting",
    "iota",
    "is_interpreting",
    "kept_rows",
    "kernel",
    "load",
    "load_columns",
    "load_matrix",
    "load_part",
    "load_rows",
    "matmul",
    "matrices",
    "narrow_rows",
    "opaque",
    "put",
    "scaled_rows",
    "set_max_registers",
    "settle",
    "smem_of_two",
    "spread_columns",
    "spread_parts",
    "spread_rows",
    "stage",
    "start",
    "start_columns",
    "start_turned",
    "store",
    "store_for_widened_rows",
    "store_from_widened_columns",
    "store_operand",
    "store_rows",
    "store_turned",
    "take_number",
    "tiled_smem",
    "uniform",
    "vector_iota",
    "wait_count",
    "wait_numbers",
    "wait_smem_to_gmem",
    "widened_columns",
    "widened_rows",
]
