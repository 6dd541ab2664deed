"""The meta-parameters of a rule as one vector, whose views they are where that is possible."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Held while meta-parameters are given other memory, or are copied.
MOVING = threading.Lock()


class FlatVector(NamedTuple):
    """The vector `(M,)`, its parts shaped like the meta-parameters, and their addresses.

    No addresses: the meta-parameters have memory of their own.
    """

    vector: Tensor
    views: list[Tensor]
    addresses: list[int]

    def is_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the vector is there, and of that type."""
        return self.vector.device == device and self.vector.dtype == dtype

    def holds(self, parameters: list[Tensor], device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the parameters are the views of a vector that is on this device."""
        return (
            list(map(Tensor.data_ptr, parameters)) == self.addresses
            and all(map(Tensor.is_contiguous, parameters))
            and self.is_on(device, dtype)
        )


def owns_memory(parameter: Tensor) -> bool:
    """Whether no other tensor or array refers to a parameter's memory, so that it may be moved."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None or type(parameter) is not nn.Parameter or parameter.is_inference():
        return False
    storage = parameter.untyped_storage()
    alone = torch.empty(1)
    return not storage.is_shared() and (
        count(storage._cdata) == count(alone.untyped_storage()._cdata)
    )
