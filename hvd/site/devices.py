"""`python -m hvd.site.devices alone|sum SECONDS`: jax on this node alone, or a sum over all processes of the job.

A process of its own for `hvd site probe`: jax may abort or hang where something is wrong. Prints a JSON document.
"""

import dataclasses
import json
import re
import sys
import time
from collections.abc import Sequence

from hvd.site.findings import Devices, Sum

_FLOATS = 1 << 20  # of a device


def main(argv: Sequence[str]) -> None:
    what, seconds = argv
    found = alone() if what == "alone" else over_all(int(seconds))
    print(json.dumps(dataclasses.asdict(found)), flush=True)


def alone() -> Devices:
    """This node's devices, after a small program has run on each."""
    import jax
    import jax.numpy as jnp

    devices = jax.local_devices()
    for device in devices:
        product = jax.device_put(jnp.ones((128, 128)), device) @ jax.device_put(jnp.ones((128, 128)), device)
        assert float(product[0, 0]) == 128.0
    number = re.search(r"cuda (\d+)", devices[0].client.platform_version)
    version = int(number[1]) if number else 0
    cuda = f"{version // 1000}.{version % 1000 // 10}" if version else ""
    return Devices(jax.default_backend(), len(devices), devices[0].device_kind, cuda)


def over_all(seconds: int) -> Sum:
    """A sum over the devices of all processes, which must meet within `seconds`."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from hvd.train import mesh

    mesh.initialize(seconds)
    devices = Mesh(np.array(jax.devices()), ("all",))
    mine = np.full((jax.local_device_count(), _FLOATS), jax.process_index() + 1, np.float32)
    rows = jax.make_array_from_process_local_data(NamedSharding(devices, PartitionSpec("all")), mine)
    add = jax.jit(lambda rows: rows.sum(0), out_shardings=NamedSharding(devices, PartitionSpec()))
    add(rows).block_until_ready()
    began = time.monotonic()
    total = float(np.asarray(add(rows).addressable_data(0))[-1])
    took = time.monotonic() - began
    expected = float(sum(device.process_index + 1 for device in jax.devices()))
    error = "" if total == expected else f"the sum is {total:g}, not {expected:g}"
    return Sum(devices.size, _FLOATS * 4 / 1e6, took, error)


if __name__ == "__main__":
    main(sys.argv[1:])
