"""Small constant tensors, one a device.

`torch.tensor([...], device="cuda")` copies from pageable memory and waits until all that is queued on the device is
done: once a batch, that keeps the CPU from working ahead of it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

Values = tuple[Any, ...]  # numbers, or tuples of numbers


@cache
def constant(values: Values, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of these values, made once and shared: not to be written to."""
    with torch.inference_mode(False):  # one made inside inference could not be used outside
        return torch.tensor(values, dtype=dtype, device=device)
