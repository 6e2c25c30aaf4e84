from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gigaxt.streaming.host_copies import HostCopies, offloaded
from gigaxt.streaming.replay import counted_saves


def test_what_is_on_the_host_is_not_copied() -> None:
    tensor = torch.zeros(3)
    assert HostCopies(1.0).of(tensor) is tensor


class Network(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 2, 3, bias=False), nn.Tanh())


def inputs() -> Tensor:
    """Channels last, as region encoders get theirs."""
    values = torch.randn(2, 8, 8, 3, generator=torch.Generator().manual_seed(1))
    return values.permute(0, 3, 1, 2)


def test_weights_stay_where_they_are_and_activations_do_not() -> None:
    network, x = Network(), inputs()
    with offloaded([*network.parameters()]):
        y = network(x)
    tanh: Any = y.grad_fn
    convolution = tanh.next_functions[0][0]
    assert convolution._saved_weight.data_ptr() == network[2].weight.data_ptr()
    assert tanh._saved_result.data_ptr() != y.data_ptr()
    assert convolution._saved_input.is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward()
    found = [p.grad for p in network.parameters()]
    network.zero_grad()
    network(x).square().sum().backward()
    for a, p in zip(found, network.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=0, atol=0)


def test_what_copies_take_is_counted() -> None:
    """Of each operation's own, in blocks of a power of two, without the weights."""
    network, x = Network(), inputs()
    with counted_saves([*network.parameters()]) as saves:
        network(x)
    pixels, hidden, answers = 4 * x.numel(), 4 * 2 * 4 * 36, 4 * 2 * 2 * 16
    assert saves.bytes == pixels + 2 * hidden + answers
    assert saves.hosted == 2048 + 2 * 2048 + 256


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
