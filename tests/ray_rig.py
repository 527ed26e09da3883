"""A Ray cluster of two nodes on this machine, for the tests of what runs on one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from ilqr_vae.cluster import connected

STORE = 80 << 20
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
    before = {p.pid for p in psutil.process_iter()}
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        cluster.add_node(**node)
        with connected(cluster.address):
            yield cluster
    finally:
        cluster.shutdown()
        left = [
            p
            for p in psutil.process_iter(["name"])
            if p.pid not in before and p.info["name"] in ("raylet", "gcs_server")
        ]
        gone, alive = psutil.wait_procs(left, timeout=20)
        assert not alive, alive
        del gone
