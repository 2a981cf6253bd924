"""What every test needs."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single_threaded() -> None:
    """Tiny models run fastest on one thread, and two would wait for each other on a busy machine."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
