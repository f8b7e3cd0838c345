"""This machine."""

from hvd.clusters.local.cluster import Local

CLUSTER = Local
