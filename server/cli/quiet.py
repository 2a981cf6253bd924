"""Keeps libraries from writing over what the commands say. Brings transformers."""

from __future__ import annotations

from transformers.utils import logging


def quiet_transformers() -> None:
    """Leave errors; drop progress bars, warnings and advice."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def share_log() -> None:
    """Let what it still says be lines of the program's own log."""
    logging.disable_default_handler()
    logging.enable_propagation()
