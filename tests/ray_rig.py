"""A Ray cluster of two nodes on this machine, for the tests of what runs on one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from ilqr_vae.cluster import connected

STORE = 80 << 20
NODE = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": STORE}  # Ray only counts the GPU
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


@contextmanager
def two_nodes() -> Iterator[Any]:
    """Ray's ``Cluster``, with two nodes of two cores each; nothing of it is left behind."""
    os.environ.update(QUIET)
    mine = psutil.Process()
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    try:
        cluster.add_node(**NODE)
        with connected(cluster.address):
            yield cluster
    finally:
        cluster.shutdown()
        names = ("raylet", "gcs_server")
        left = [p for p in mine.children(recursive=True) if p.name() in names]
        _, alive = psutil.wait_procs(left, timeout=20)
        assert not alive, alive
