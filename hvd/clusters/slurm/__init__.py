"""Slurm."""

from hvd.clusters.slurm.cluster import Slurm

CLUSTER = Slurm
