"""Kubernetes."""

from hvd.clusters.kubernetes.cluster import Kubernetes

CLUSTER = Kubernetes
