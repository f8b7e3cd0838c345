"""Does host memory grow with each save? Resident memory over many checkpoints of a large state (acceptance B6).

    python -m tests.benchmarks.bench_checkpoint_memory [--megabytes 1000] [--saves 20] [--folder DIR]

The state (parameters and Adam's moments, as hvd.train saves them) is changed by a donating step between the saves, as
in training. Blocking: how long `save` keeps the step loop. Total: until the files are whole. The last checkpoint is
restored at the end and compared.
"""

import argparse
import dataclasses
import gc
import resource
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hvd.train import mesh, state
from hvd.train.checkpoints import Checkpoints

LAYERS = 8


class Weights(nnx.Module):
    """Nothing but parameters: `LAYERS` matrices and as many vectors."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.kernels = nnx.List([nnx.Param(jax.random.normal(rngs.params(), (width, width))) for _ in range(LAYERS)])
        self.biases = nnx.List([nnx.Param(jnp.zeros(width)) for _ in range(LAYERS)])


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument("--folder", default=None)
    args = parser.parse_args()
    width = int((args.megabytes * 1e6 / 12 / LAYERS) ** 0.5)  # a parameter and two moments, four bytes each

    graph = state.Graph(lambda rngs: Weights(width, rngs))
    init = state.make_init(graph, optax.adam(1e-3), ema=False, target=False)
    like = state.abstract(init, mesh.make_devices(1))
    run = state.create(init, 0, like)
    step = jax.jit(
        lambda s: dataclasses.replace(s, trained=jax.tree.map(lambda x: x + 1.0, s.trained), step=s.step + 1),
        donate_argnums=0,
    )
    run = jax.block_until_ready(step(run))
    size = state.num_bytes(like)["state_bytes"]
    print(f"state {size / 1e6:.0f} MB; resident before the first save {resident_mb():.0f} MB")
    print(f"{'save':>4} {'blocking s':>10} {'total s':>8} {'after it MB':>11} {'peak while writing MB':>21}")
    blocking, total, after = [], [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        saves = Checkpoints(folder, graph, 0)
        for i in range(1, args.saves + 1):
            began = time.perf_counter()
            saves.save(i, run, {})
            blocking.append(time.perf_counter() - began)
            run = jax.block_until_ready(step(run))
            peak = resident_mb()
            saves.wait()
            total.append(time.perf_counter() - began)
            gc.collect()
            after.append(resident_mb())
            print(f"{i:4} {blocking[-1]:10.2f} {total[-1]:8.2f} {after[-1]:11.0f} {peak:21.0f}", flush=True)
        del run
        began = time.perf_counter()
        found, _ = saves.restore(args.saves, like)
        jax.block_until_ready(found)
        restored = time.perf_counter() - began
        assert int(found.step) == args.saves, "the newest state is the one restored"
        saves.close()
    half = len(after) // 2
    slope = np.polyfit(np.arange(len(after) - 2), after[2:], 1)[0] if len(after) > 3 else float("nan")
    print(
        f"resident after saves 3..{half}: {statistics.mean(after[2:half]):.0f} MB, after the last {half}: "
        f"{statistics.mean(after[half:]):.0f} MB; slope {slope:+.1f} MB a save"
    )
    print(
        f"median blocking {statistics.median(blocking):.2f} s, total {statistics.median(total):.2f} s; "
        f"restore {restored:.2f} s"
    )


if __name__ == "__main__":
    main()
