"""Does it fit: what a step needs on a device against what the device has. Imports no jax."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from hvd.configs import Experiment
from hvd.plan.devices import Cluster
from hvd.plan.request import Measurement, Stage

PLACED_AHEAD = 3  # batches: the loader's queue holds two, a third waits for its place


@dataclass(frozen=True)
class Verdict:
    """One stage on one set of devices.

    Attributes:
        limit: bytes of a device that the run may fill.
        ahead: bytes of batches that lie on the device beside the one in use (prefetched, validation).
    """

    cfg: Experiment
    stage: Stage
    cluster: Cluster
    limit: int
    measured: Measurement

    @property
    def stage_cfg(self) -> Any:
        return getattr(self.cfg, self.stage)

    @property
    def ahead(self) -> int:
        return (PLACED_AHEAD + self.stage_cfg.val_batches) * self.measured.batch

    @property
    def least(self) -> int:
        """Needed whatever a compiler does."""
        return self.measured.least + self.ahead

    @property
    def needed(self) -> int:
        """By the compiler's own account, or the least where nothing was compiled."""
        return (self.measured.peak if self.measured.compiled else self.measured.least) + self.ahead

    @property
    def fits(self) -> bool | None:
        """None: the CPU's compiler needs more than the device has, the GPU's may not."""
        if self.least > self.limit:
            return False
        if not self.measured.compiled:
            return None
        if self.needed <= self.limit:
            return True
        return False if self.measured.compiler == "cuda" else None

    @property
    def fsdp(self) -> int:
        return self.cfg.fsdp_devices or self.cluster.per_node

    @property
    def host(self) -> int:
        """Bytes of host memory of a node that a checkpoint being written takes: the state goes there before the disk.

        With fsdp inside the node the first node holds (and writes) all of it.
        """
        groups = max(1, self.fsdp // self.cluster.per_node)
        return self.measured.state_total // groups

    def step_seconds(self, utilisation: float) -> float | None:
        """Of a step, were the devices used at `utilisation` of their peak; None where FLOPs were not counted."""
        if not self.measured.flops:
            return None
        return self.measured.flops / (self.cluster.count * self.cluster.accelerator.flops * utilisation)

    def as_json(self) -> dict[str, Any]:
        """What `hvd plan --json` prints of it."""
        return {
            "config": self.cfg.name,
            "stage": self.stage,
            "devices": f"{self.cluster.per_node}x{self.cluster.name}",
            "nodes": self.cluster.nodes,
            "fits": self.fits,
            "needed": self.needed,
            "limit": self.limit,
            "least": self.least,
            "ahead": self.ahead,
            "categories": self.measured.categories() if self.measured.compiled else self.measured.state,
            "host": self.host,
            "measured": dataclasses.asdict(self.measured),
        }
