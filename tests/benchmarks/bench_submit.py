"""Latency of a submission, on a Slurm cluster that this brings up (root and Debian's packages, as in tests/clusters).

    python -m tests.benchmarks.bench_submit [N]

Rows: the command `python launch/submit.py`, the same in a process that has imported it, `sbatch slurm/value.sbatch` by
hand, and submitit's own way, AutoExecutor.submit of a function. One of each in turn, N times, so that they share the
machine's noise; all nodes are taken meanwhile, so that no job of ours runs beside them. Ours check config, datasets and
run folders, and ask Slurm whether it could ever run the job (`sbatch --test-only`), before they hand it over.
"""

import argparse
import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.clusters.site import ROOT, Site
from tests.clusters.slurm_cluster import SlurmCluster, missing

NODES = 2


def ways(site: Site) -> dict[str, Callable[[], object]]:
    """Name of the row -> one submission. The last three expect the site's folder and environment around them."""
    import submitit

    from hvd.launch import submit

    flags = [*site.options, *site.site, "--stage", "value"]

    def call() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            assert submit.main(flags) == 0

    def pickled() -> object:
        executor = submitit.AutoExecutor(folder=site.folder / "submitit", cluster="slurm")
        executor.update_parameters(name="naive", nodes=1, tasks_per_node=1, timeout_min=60)
        return executor.submit(os.getpid)

    return {
        "`python launch/submit.py`": lambda: site.call(sys.executable, str(ROOT / "launch" / "submit.py"), *flags),
        "the same, in one process": call,
        "`sbatch slurm/value.sbatch`": lambda: site.sbatch("slurm/value.sbatch", *site.options),
        "submitit's AutoExecutor.submit": pickled,
    }


def measure(site: Site, count: int) -> dict[str, list[float]]:
    """Row -> seconds of each submission; the first of each is not counted."""
    each = ways(site)
    found: dict[str, list[float]] = {name: [] for name in each}
    for _ in range(count + 1):
        for name, way in each.items():
            begin = time.perf_counter()
            way()
            found[name].append(time.perf_counter() - begin)
        site.call("scancel", "--state=PENDING", f"--user={os.getuid()}")
    return {name: times[1:] for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", metavar="N", nargs="?", type=int, default=100)
    count = parser.parse_args().count
    if lacking := missing():
        sys.exit(lacking)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        with SlurmCluster(root / "cluster", nodes=NODES) as cluster:
            site = Site(root / "checkout", cluster, root / "shared")
            taken = site.sbatch("-N", str(NODES), "--exclusive", "-t", "0", "-o", "/dev/null", "--wrap", "sleep 86400")
            cluster.wait_state(taken, "RUNNING", timeout=30)
            os.environ.update(site.env)
            with contextlib.chdir(site.folder):
                rows = measure(site, count)
            cluster.run("scancel", taken)
    print(f"| {count} submissions by | p50, ms | p95, ms | longest, ms |\n|---|---|---|---|")
    for name, times in rows.items():
        p95 = statistics.quantiles(times, n=20, method="inclusive")[-1] if len(times) > 1 else times[0]
        print(f"| {name} | {statistics.median(times) * 1e3:.0f} | {p95 * 1e3:.0f} | {max(times) * 1e3:.0f} |")


if __name__ == "__main__":
    main()
