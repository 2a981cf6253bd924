"""Small numbers on their way between the host and a device, so that neither waits for the other."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same there, for work that is launched from now on. tensor: on the host."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class ToHost:
    """A copy that is made on the host once the device gets there, before all work that is launched from now on."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        self._copy = tensor
        if tensor.device.type == "cuda":
            self._copy = tensor.to("cpu", non_blocking=True)  # into page-locked memory
            self._done = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self) -> torch.Tensor:
        """The copy, complete."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy
