"""What every test needs."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging as transformers_logging

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is loaded: without a GPU its kernels are interpreted


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_single_threaded() -> None:
    """Tiny models run fastest on one thread, and two would wait for each other on a busy machine."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """Commands that run in the tests' process set up the log; the next test is not to notice."""
    loggers = [logging.getLogger(name) for name in ("weft", "transformers")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    hook = threading.excepthook
    yield
    threading.excepthook = hook
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers
