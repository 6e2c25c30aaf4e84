from __future__ import annotations

import gc

import pytest
import torch

from gigaxt.host_copies import HostCopies


def test_what_is_on_the_host_is_not_copied() -> None:
    tensor = torch.zeros(3)
    assert HostCopies(1.0).of(tensor) is tensor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_one_copy_of_each_while_there_is_room() -> None:
    copies = HostCopies(1.5 * 2**-10)  # room for one and a half of a MiB
    large, other = (torch.randn(2**18, device="cuda") for _ in range(2))
    copy = copies.of(large)
    assert copy.is_pinned()
    assert copies.of(large) is copy
    assert copies.of(other) is other
    torch.cuda.synchronize()
    assert torch.equal(copy, large.cpu())
    del large
    gc.collect()
    small = torch.ones(2**16, device="cuda")
    assert copies.of(small) is not copy
