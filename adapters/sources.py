"""Where adapters come from: a source, checked against what the server may read, and made a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weft.adapters.folder import WEIGHTS_FILE
from weft.adapters.peft_config import CONFIG_FILE
from weft.errors import InvalidAdapter, InvalidRequest, Problem

_MAX_PATH = 1024


class Sources:
    """The allow-list. Every method may be called from any thread."""

    def __init__(self, roots: Sequence[Path]) -> None:
        """roots: folders that `file:` sources must lie under."""
        self._roots = tuple(root.resolve() for root in roots)

    def check(self, source: str) -> None:
        """Look at the form and the allow-list alone. Raises InvalidRequest."""
        self._folder_of(source)

    def fetch(self, source: str) -> Path:
        """The local folder that holds the adapter; blocks. Raises InvalidRequest, InvalidAdapter."""
        folder = self._folder_of(source)
        outside = [
            Problem(path.name, "is a link to a file outside the allowed roots")
            for path in (folder / CONFIG_FILE, folder / WEIGHTS_FILE)
            if not self._is_allowed(path.resolve())
        ]
        if outside:
            raise InvalidAdapter(source, outside)
        return folder

    def _folder_of(self, source: str) -> Path:
        """The folder of a `file:` source, symlinks resolved. Raises InvalidRequest unless it lies under a root."""
        scheme, _, path = source.partition(":")
        if scheme != "file" or not path or not path.isprintable() or len(path) > _MAX_PATH:
            raise InvalidRequest.of(
                "adapter.source",
                f"is {source[:200]!r}; must be file:/path/to/a/PEFT/folder, printable, {_MAX_PATH} long at most",
            )
        try:
            folder = Path(path).resolve()
        except (OSError, RuntimeError) as error:
            raise InvalidRequest.of(
                "adapter.source", f"is {source[:200]!r}, which can't be followed ({error})"
            ) from None
        if not self._is_allowed(folder):
            roots = ", ".join(map(str, self._roots)) or "none is set"
            raise InvalidRequest.of(
                "adapter.source",
                f"{path} lies under no allowed root ({roots}); start the server with --source-root",
            )
        return folder

    def _is_allowed(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self._roots)
