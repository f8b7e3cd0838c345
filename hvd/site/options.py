"""What `hvd site` is told."""

from dataclasses import dataclass

from hvd.fields import AT_LEAST_1, NOT_NEGATIVE, POSITIVE, option

CLUSTERS = ("slurm", "kubernetes")
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Check:
    """Try a cluster by one small job. A line for each thing: ok, FAILED and what to do, or not checked and why.

    The flags and site files are the launcher's: the job has the nodes, GPUs and memory that a training would have.
    Ends with 0 where nothing has failed, else with 1. Nothing of the job stays.
    """

    nodes: int = option(0, NOT_NEGATIVE, "of the job; 0: two, or one where a Kubernetes overlay has Jobs of one pod")
    cluster: str = option("auto", f"{' or '.join(CLUSTERS)}; auto is Slurm where it answers")
    timeout: int = option(600, AT_LEAST_1, "seconds that the job may wait in the queue")
    patience: float = option(PATIENCE_S, POSITIVE, "seconds that a process of the job waits for the others")
    space: float = option(10.0, NOT_NEGATIVE, "GB that must be free where runs are written")


@dataclass(frozen=True)
class Probe:
    """What the job runs on each node."""

    folder: str = option("runs/.hvd-site", "to be made, and removed, on the storage that is tried")
    patience: float = option(PATIENCE_S, POSITIVE, "seconds to wait for the other processes")

    def words(self) -> tuple[str, ...]:
        """Behind `hvd site`."""
        return ("probe", "--folder", self.folder, "--patience", f"{self.patience:g}")
