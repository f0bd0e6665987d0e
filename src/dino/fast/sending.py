"""What the host decides while a step runs, on its way to the device."""

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for what it is busy with: a card copies from pinned memory by itself."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
