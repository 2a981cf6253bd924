"""What memory there is: the machine's, within the limits of control groups; and what a block takes."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch

from weft.server.engine.memory import Memory, host_memory, memory_of, peak_of

GIB = 1 << 30
MEMINFO = f"MemTotal: {16 * GIB >> 10} kB\nMemFree: 1024 kB\nMemAvailable: {12 * GIB >> 10} kB\nHugePages_Total: 0\n"
MACHINE = Memory(16 * GIB, 12 * GIB)
UNLIMITED_V1 = 9223372036854771712


def machine(root: Path, groups: str, files: dict[str, str] | None = None) -> Memory:
    """What is found under a root with these lines of /proc/self/cgroup, and these files of /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(MEMINFO)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in (files or {}).items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return host_memory(root)


def v2(folder: str, limit: str, usage: int, inactive: int = 0) -> dict[str, str]:
    at = f"{folder}/" if folder else ""
    return {
        f"{at}memory.max": f"{limit}\n",
        f"{at}memory.current": f"{usage}\n",
        f"{at}memory.stat": f"anon 5\ninactive_file {inactive}\n",
    }


def v1(folder: str, limit: int, usage: int, inactive: int = 0) -> dict[str, str]:
    at = f"memory/{folder}/" if folder else "memory/"
    return {
        f"{at}memory.limit_in_bytes": f"{limit}\n",
        f"{at}memory.usage_in_bytes": f"{usage}\n",
        f"{at}memory.stat": f"inactive_file 1\ntotal_inactive_file {inactive}\n",
    }


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert machine(tmp_path, "") == MACHINE


def test_a_limit_of_version_2_holds_and_its_page_cache_is_free(tmp_path: Path) -> None:
    found = machine(tmp_path, "0::/app\n", v2("app", str(4 * GIB), 3 * GIB, GIB))
    assert found == Memory(4 * GIB, 2 * GIB)


def test_no_limit_of_version_2_is_none(tmp_path: Path) -> None:
    assert machine(tmp_path, "0::/app\n", v2("app", "max", 3 * GIB)) == MACHINE


def test_the_limits_of_all_groups_above_hold(tmp_path: Path) -> None:
    files = v2("pod", str(8 * GIB), 7 * GIB) | v2("pod/app", str(4 * GIB), 1 * GIB)
    assert machine(tmp_path, "0::/pod/app\n", files) == Memory(4 * GIB, 1 * GIB)


def test_a_container_that_sees_its_own_group_alone(tmp_path: Path) -> None:
    """The path is the host's, or leads out of the container, but what is mounted is the container's."""
    files = v2("", str(2 * GIB), GIB)
    for at, path in enumerate(("/kubepods/pod1/c1", "/../../c1", "/")):
        assert machine(tmp_path / str(at), f"0::{path}\n", files) == Memory(2 * GIB, GIB)


def test_a_limit_of_version_1_holds_and_its_page_cache_is_free(tmp_path: Path) -> None:
    groups = "9:pids:/x\n4:hugetlb,memory:/docker/c1\n0::/\n"
    files = v1("", UNLIMITED_V1, 10 * GIB) | v1("docker/c1", 2 * GIB, GIB, GIB // 2)
    assert machine(tmp_path, groups, files) == Memory(2 * GIB, 3 * GIB // 2)


def test_no_limit_of_version_1_is_none(tmp_path: Path) -> None:
    assert machine(tmp_path, "4:memory:/\n", v1("", UNLIMITED_V1, 10 * GIB)) == MACHINE


def test_more_used_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    assert machine(tmp_path, "0::/\n", v2("", str(GIB), 2 * GIB)) == Memory(GIB, 0)


def test_files_that_say_nothing_are_passed_over(tmp_path: Path) -> None:
    assert machine(tmp_path, "0::/\n", {"memory.max": "", "memory.current": "what"}) == MACHINE


def test_this_machine_has_some() -> None:
    memory = memory_of(torch.device("cpu"))
    assert 0 < memory.free_bytes <= memory.total_bytes


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what is resident")
def test_a_peak_is_what_was_taken_at_once_and_given_back() -> None:
    size = 64 << 20
    with peak_of(torch.device("cpu")) as peak:
        for _ in range(3):
            numpy.ones(size, dtype=numpy.uint8)
    assert size * 0.9 <= peak.num_bytes < size * 2
    with peak_of(torch.device("cpu")) as small:
        numpy.ones(1, dtype=numpy.uint8)
    assert small.num_bytes < size / 4
