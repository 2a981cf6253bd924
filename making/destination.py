"""Where a command puts what it makes: a folder that is complete or is not there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from weft.errors import InvalidConfig


def check_new(path: Path) -> None:
    """Raises InvalidConfig where something is there already."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InvalidConfig(f"--output is {str(path)!r}, which is there already: name a new folder")


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to write into; it takes that place once the block ends, and goes where it fails.

    Raises InvalidConfig where something is at `path` already, or nothing can be written there.
    """
    check_new(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        being_made = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise InvalidConfig(f"--output is {str(path)!r}, which can't be written: {error.strerror}") from None
    try:
        yield being_made
        being_made.chmod(0o755)
        for made in being_made.rglob("*"):  # as readable as others: safetensors keeps its files to their owner
            made.chmod(0o755 if made.is_dir() else 0o644)
        being_made.replace(path)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidConfig(f"--output is {str(path)!r}, which can't be written: {reason}") from error
    finally:
        shutil.rmtree(being_made, ignore_errors=True)
