"""Clusters for the tests of this folder. They need root and Debian's packages; else their tests are skipped."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters import kubernetes_cluster
from tests.clusters.kubernetes_cluster import KubernetesCluster
from tests.clusters.kubernetes_docs import commands, follow
from tests.clusters.slurm_cluster import SlurmCluster, missing
from tests.image import builder


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


@pytest.fixture(scope="session")
def kubernetes(tmp_path_factory) -> Iterator[KubernetesCluster]:
    """One node, with the cpu image that docker/Dockerfile builds of this checkout."""
    if lacking := kubernetes_cluster.missing() or builder.missing():
        pytest.skip(lacking)
    archive = builder.folder() / "hvd-cpu.tar"
    builder.call(kubernetes_cluster.ROOT / "docker" / "save.sh", builder.build(), archive, "localhost/hvd:cpu")
    with KubernetesCluster(tmp_path_factory.mktemp("kubernetes"), (archive,)) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def first_try(kubernetes) -> dict[str, str]:
    """The lines of docs/kubernetes.md, "A first try, on CPUs", but for the last one, and what each printed. Two stages
    of a run called demo are complete then."""
    return {command: follow(kubernetes, command) for command in commands("A first try, on CPUs")[:-1]}


@pytest.fixture(scope="session")
def team(kubernetes) -> Path:
    """The volume of the namespace `team`, which has nothing else; empty, but for what its tests leave."""
    kubernetes.make_volume("team", kubernetes.folder / "team", "team")
    return kubernetes.folder / "team"
