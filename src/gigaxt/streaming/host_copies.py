"""Tensors of a device that wait for the backward pass in the host's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gigaxt.streaming.rows import Budget


class HostCopies:
    """One copy of each tensor, in pinned memory, as long as there is room.

    The host does not wait for a copy: it is queued on the device's stream, behind the work that computes the tensor and
    ahead of any work that copies it back. A tensor must not be changed in place in between.

    Args:
        gib: memory of the host that the copies may take; 0: none are made.
    """

    def __init__(self, gib: float) -> None:
        self.budget = Budget(gib)
        self._made = WeakTensorKeyDictionary()

    def of(self, tensor: Tensor) -> Tensor:
        """The copy of `tensor`; the tensor itself if it is on the host already, or no room is left."""
        if tensor.device.type == "cpu" or not self.budget.left:
            return tensor
        made: Tensor | None = self._made.get(tensor)
        if made is None:
            if not self.budget.take(pinned_size(tensor.nbytes)):
                return tensor
            made = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            self._made[tensor] = made
        return made


def pinned_size(size: int) -> int:
    """Bytes that PyTorch allocates for a pinned block of `size` bytes: the next power of two."""
    return 1 << (size - 1).bit_length() if size else 0


@contextlib.contextmanager
def offloaded(stay: Sequence[Tensor]) -> Iterator[None]:
    """Keep what autograd saves inside the block on the host, in pinned memory, but for `stay`.

    Unlike `torch.autograd.graph.save_on_cpu` it does not copy weights (`stay`) with every chunk, keeps channels-last
    tensors in that layout, and does not make the host wait for a copy (see `HostCopies`).
    """
    there = {t.untyped_storage().data_ptr() for t in stay}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.untyped_storage().data_ptr() in there:
            return tensor.device, tensor.detach()  # the tensor itself would make a cycle with its own node
        copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, copy.copy_(tensor, non_blocking=True)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
