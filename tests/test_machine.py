"""Memory and cores within a container's limits, read from control groups of both versions."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import psutil
import pytest

from ilqr_vae.machine import available_memory, cores, own_core

MIB = 2**20


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


V2 = {
    "proc/self/cgroup": "0::/system.slice/docker-1.scope",
    "sys/fs/cgroup/system.slice/docker-1.scope/memory.max": str(300 * MIB),
    "sys/fs/cgroup/system.slice/docker-1.scope/memory.current": str(200 * MIB),
    "sys/fs/cgroup/system.slice/docker-1.scope/memory.stat": f"anon 1\ninactive_file {50 * MIB}",
    "sys/fs/cgroup/system.slice/docker-1.scope/cpu.max": "150000 100000",
}
V1 = {
    "proc/self/cgroup": "4:memory:/docker/1\n3:cpuset:/\n2:cpu,cpuacct:/docker/1\n0::/",
    "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes": str(300 * MIB),
    "sys/fs/cgroup/memory/docker/1/memory.usage_in_bytes": str(200 * MIB),
    "sys/fs/cgroup/memory/docker/1/memory.stat": f"cache 1\ntotal_inactive_file {50 * MIB}",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "150000",
    "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000",
}


@pytest.mark.parametrize("files", [V2, V1])
def test_what_is_left_of_the_containers_limit_counts(tmp_path: Path, files: dict[str, str]) -> None:
    root = _write(tmp_path, files)
    assert available_memory(root) == 150 * MIB
    assert cores(root) <= 2  # 1.5, rounded up


def test_a_limit_at_the_mount_point(tmp_path: Path) -> None:
    """A container sees its own group as the mount point; the kernel may state the host's path."""
    inside = {
        "proc/self/cgroup": "4:memory:/docker/1\n0::/docker/1",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(120 * MIB),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(20 * MIB),
    }
    assert available_memory(_write(tmp_path, inside)) == 100 * MIB


def test_the_tightest_of_nested_limits_counts(tmp_path: Path) -> None:
    outer = {
        "sys/fs/cgroup/system.slice/memory.max": str(90 * MIB),
        "sys/fs/cgroup/system.slice/memory.current": str(80 * MIB),
        "sys/fs/cgroup/system.slice/cpu.max": "max 100000",
    }
    assert available_memory(_write(tmp_path, V2 | outer)) == 10 * MIB


def test_a_group_beyond_its_limit_leaves_nothing(tmp_path: Path) -> None:
    full = V2 | {"sys/fs/cgroup/system.slice/docker-1.scope/memory.current": str(400 * MIB)}
    assert available_memory(_write(tmp_path, full)) == 0


@pytest.mark.parametrize("limit", ["max", ""])
def test_without_a_limit_the_machine_decides(tmp_path: Path, limit: str) -> None:
    name = "sys/fs/cgroup/system.slice/docker-1.scope/memory.max"
    cpu = "sys/fs/cgroup/system.slice/docker-1.scope/cpu.max"
    root = _write(tmp_path, V2 | {name: limit, cpu: "max 100000"})
    total = psutil.virtual_memory().total
    assert 300 * MIB < available_memory(root) <= total
    assert cores(root) == cores(tmp_path / "nowhere")


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="threads have no cores of their own"
)
def test_other_threads_leave_the_core_of_the_caller_meanwhile() -> None:
    done = threading.Event()
    others = [threading.Thread(target=done.wait, args=(60,)) for _ in range(2)]
    ended = threading.Thread(target=int)
    for thread in (*others, ended):
        thread.start()
    ended.join()

    def usable() -> list[set[int]]:
        return [os.sched_getaffinity(thread.native_id or 0) for thread in others]

    every = os.sched_getaffinity(0)
    try:
        with own_core([*others, ended]):
            there = usable()
        assert usable() == [every, every]
        assert there[0] == there[1] <= every
        assert len(there[0]) == max(1, len(every) - 1)  # with a single core nothing can be done
        os.sched_setaffinity(0, {min(every)})
        with own_core(others):
            assert usable() == [every, every]
    finally:
        os.sched_setaffinity(0, every)
        done.set()
        for thread in others:
            thread.join()
