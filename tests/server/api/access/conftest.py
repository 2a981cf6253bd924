"""One guarded server for all tests of access."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from guarded import Guarded, guarded


@pytest.fixture(scope="session")
def guard(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded(root, tmp_path_factory.mktemp("guarded")) as guard:
        yield guard
