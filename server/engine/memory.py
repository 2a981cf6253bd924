"""How much memory there is, is free, and is taken at the most while something runs."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_ROOT = Path("/")
_RESET_PEAK = "5"
"""What /proc/self/clear_refs takes to set the peak of the resident memory to what is resident now."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that this process could have in all, and bytes that it could still take."""

    total_bytes: int
    free_bytes: int

    def within(self, other: Memory) -> Memory:
        """What both allow."""
        return Memory(min(self.total_bytes, other.total_bytes), min(self.free_bytes, other.free_bytes))


@dataclass(slots=True)
class Peak:
    """What ran inside a `peak_of` block took at the most, beyond what was taken before."""

    num_bytes: int = 0


def memory_of(device: torch.device) -> Memory:
    """Of a GPU, or of the host for the CPU."""
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        return Memory(total_bytes, free_bytes)
    return host_memory()


def host_memory(root: Path = _ROOT) -> Memory:
    """Of the machine, within the limits of the control groups (v1 and v2) that the process is in.

    Page cache counts as free: the system gives it up. root: where /proc and /sys/fs/cgroup are.
    """
    memory = _machine(root)
    for folder, limit_file, usage_file, stat_prefix in _control_groups(root):
        limit = _number(folder / limit_file)
        usage = _number(folder / usage_file)
        if limit is not None and usage is not None:
            cached = _fields(folder / "memory.stat").get(f"{stat_prefix}inactive_file", 0)
            memory = memory.within(Memory(limit, max(0, limit - usage + cached)))
    return memory


@contextmanager
def peak_of(device: torch.device) -> Iterator[Peak]:
    """Measure the block: the allocator's on a GPU, else what is resident, where the system can say."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        yield peak
        peak.num_bytes = torch.cuda.max_memory_reserved(device) - before
        torch.cuda.empty_cache()
    else:
        _trim()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        before = _resident().get("VmRSS", 0)
        yield peak
        peak.num_bytes = max(0, _resident().get("VmHWM", _lifetime_peak()) - before)


def _machine(root: Path) -> Memory:
    fields = _fields(root / "proc/meminfo")
    if "MemTotal" in fields and "MemAvailable" in fields:
        return Memory(fields["MemTotal"], fields["MemAvailable"])
    page = os.sysconf("SC_PAGE_SIZE")
    return Memory(os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page)


def _control_groups(root: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Folder, file of the limit, file of the usage, and prefix in memory.stat of each group that may limit us.

    A limit holds for all groups below it. In a container the path is often that of the host, and what is mounted is the
    container's own group: so folders that are not there are passed over.
    """
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
            parts = [part for part in path.split("/") if part and part != ".."]
            folders = [mount.joinpath(*parts[:length]) for length in range(len(parts) + 1)]
            for folder in filter(Path.is_dir, folders):
                if controllers:
                    yield folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
                else:
                    yield folder, "memory.max", "memory.current", ""


def _number(path: Path) -> int | None:
    """None where there is no such file, or it says "max"."""
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _fields(path: Path) -> dict[str, int]:
    """Lines such as `MemTotal: 8000 kB` and `inactive_file 4096`, in bytes; empty where there is no such file."""
    fields = {}
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, *values = line.replace(":", " ").split()
            if values and values[0].isdigit():
                fields[name] = int(values[0]) * (1024 if values[1:] == ["kB"] else 1)
    return fields


def _resident() -> dict[str, int]:
    return _fields(Path("/proc/self/status"))


def _lifetime_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _trim() -> None:
    """Give freed memory back to the system, so that taking it again is seen; glibc alone can be asked to."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
