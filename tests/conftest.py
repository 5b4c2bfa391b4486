"""Before JAX starts: eight CPU devices, for the tests of sharding; and a faster interpreter."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from typing import Any

import jax
import numpy as np
from jax._src import callback as jax_callback
from jax._src.pallas.mosaic_gpu.interpret import shared_memory


def interpret_numbers_of_numpy() -> None:
    """Gives the interpreter of Mosaic's kernels the arrays of numpy that its callbacks come with.

    JAX makes an array of its own of each number first, 80,000 in a test of attention: that takes
    two thirds of the time.
    """
    of_jax, to_int = jax_callback.io_callback_impl, shared_memory._to_int

    def call(*args: Any, callback: Any, **options: Any) -> Any:
        of_interpreter = getattr(callback.callback_func, "func", None)  # they are partial
        if not getattr(of_interpreter, "__module__", "").startswith(shared_memory.__package__):
            return of_jax(*args, callback=callback, **options)
        return jax.tree.map(np.asarray, callback(*map(np.array, args)))

    def number(x: Any) -> Any:
        return x.item() if isinstance(x, np.ndarray) else to_int(x)

    jax_callback.io_callback_impl = call
    shared_memory._to_int = number


if jax.__version_info__ >= (0, 11):  # before, it does not run these kernels
    interpret_numbers_of_numpy()
