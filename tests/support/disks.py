"""A disk of its own for a process, so small that it can be filled: a tmpfs in a mount namespace of the process."""

from __future__ import annotations

import errno
import functools
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

_MOUNT = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && exec "$@"'
_UNSHARE = ("unshare", "--user", "--map-root-user", "--mount")
FILLER = "filler"


@functools.cache
def can_mount() -> bool:
    """Whether this system lets an ordinary process have a mount namespace."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*_UNSHARE, "mount", "-t", "tmpfs", "none", "/tmp"], check=False).returncode == 0  # noqa: S108


needs_a_disk = pytest.mark.skipif(not can_mount(), reason="no user namespaces with mounts")


def on_disk(folder: Path, num_kib: int, command: Sequence[str]) -> list[str]:
    """The command, for a process that sees a disk of that size in the place of the folder."""
    return [*_UNSHARE, "sh", "-c", _MOUNT, "sh", f"{num_kib}k", str(folder), *command]


def seen_by(pid: int, folder: Path) -> Path:
    """The folder as that process sees it."""
    return Path(f"/proc/{pid}/root{folder}")


def fill(folder: Path) -> None:
    """To the last byte, with one file."""
    with (folder / FILLER).open("wb", buffering=0) as file:
        for block in (1 << 16, 4096, 1):
            try:
                while True:
                    file.write(bytes(block))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
