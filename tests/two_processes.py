"""One of the processes of `test_parallel.test_two_processes`: ``python -m tests.two_processes``.

Each has two devices of a mesh of four, and checks its own part of the output and of the gradients.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxflash

DEVICES_EACH, PROCESSES = 2, 2


def main(address: str, process: int) -> None:
    """Joins the others at an address."""
    jax.distributed.initialize(address, PROCESSES, process)
    assert len(jax.devices()) == DEVICES_EACH * PROCESSES
    assert len(jax.local_devices()) == DEVICES_EACH
    mesh = Mesh(np.array(jax.devices()), ("sequence",))
    by_token = P(None, "sequence")

    def ring(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jaxflash.ring_attention(q, k, v, axis_name="sequence", is_causal=True)

    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jaxflash.dot_product_attention(q, k, v, is_causal=True, implementation="reference")

    def of(attention, *qkv):  # type: ignore[no-untyped-def]
        out, pull = jax.vjp(attention, *qkv)
        return out, *pull(jnp.cos(out))

    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 64, n, 16), np.float32) for n in (4, 2, 2)]
    sharding = NamedSharding(mesh, by_token)
    shards = [jax.make_array_from_callback(x.shape, sharding, x.__getitem__) for x in arrays]
    sharded = jax.shard_map(ring, mesh=mesh, in_specs=by_token, out_specs=by_token)
    found = jax.jit(lambda *qkv: of(sharded, *qkv))(*shards)
    for mine, right in zip(found, of(whole, *arrays), strict=True):
        for shard in mine.addressable_shards:
            np.testing.assert_allclose(shard.data, np.asarray(right)[shard.index], atol=2e-5)
    print(f"process {process} of {PROCESSES}: equal")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
