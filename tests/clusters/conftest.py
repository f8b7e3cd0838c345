"""Slurm clusters for the tests of this folder. They need root and Debian's packages; else their tests are skipped."""

from collections.abc import Iterator

import pytest

from tests.clusters.slurm_cluster import SlurmCluster, missing


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[SlurmCluster]:
    """Four nodes of four CPUs, without accounting. Preempted jobs have 5 s."""
    yield from _cluster(tmp_path_factory.mktemp("slurm"), nodes=4, grace=5)


@pytest.fixture(scope="module")
def slurm_accounting(tmp_path_factory) -> Iterator[SlurmCluster]:
    """Two nodes, with slurmdbd and MariaDB: `sacct` works."""
    yield from _cluster(tmp_path_factory.mktemp("slurm_accounting"), nodes=2, accounting=True)


def _cluster(root, **options) -> Iterator[SlurmCluster]:
    lacking = missing(options.get("accounting", False))
    if lacking:
        pytest.skip(lacking)
    with SlurmCluster(root, **options) as cluster:
        yield cluster
