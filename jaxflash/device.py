"""The device that a call will run on."""

import jax

from pallas_kernels import spec


def target() -> spec.Device:
    """The device of the abstract mesh in scope, if any, else the default one.

    Ahead-of-time compilation for a device that is not here names it through
    ``jax.sharding.use_abstract_mesh``.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return spec.Device(device.platform, device.device_kind)
