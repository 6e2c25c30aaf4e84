"""A streamed module is looked at once, for as long as it is what it was."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gigaxt
from gigaxt.errors import ConfigError
from gigaxt.streaming import single
from gigaxt.streaming.known import _known
from gigaxt.streaming.nested import stream_nested
from gigaxt.streaming.replay import first_look
from gigaxt.streaming.single import stream


class Net(nn.Module):
    """Two kinds of layers, and a number that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.factor, self.counts = nn.Linear(4, 4), 1.0, False
        self.act, self.scales = torch.tanh, [torch.ones(4, dtype=torch.float64)]
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.counts:
            self.calls += 1
        found: Tensor = self.act(self.layer(x)) * self.factor * self.scales[0]
        return found


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each first look."""
    seen: list[int] = []

    def look(call: Any, aliases: Any, rows: Any, leaves: Any) -> Any:
        seen.append(rows.count)
        return first_look(call, aliases, rows, leaves)

    monkeypatch.setattr(single, "first_look", look)
    return seen


PIXELS = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def step(module: nn.Module, pixels: Tensor = PIXELS, budget_gib: float = 0.0) -> list[Tensor]:
    module.zero_grad()
    chunks = [slice(i, i + 3) for i in range(0, len(pixels), 3)]
    settings = gigaxt.Streaming(budget_gib=budget_gib)
    out = stream(module, lambda c: pixels[c], chunks, seed=0, streaming=settings)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in module.parameters() if p.grad is not None)]


def test_one_look_serves_the_steps_that_follow(looks: list[int]) -> None:
    module, other = Net().double(), Net().double()
    other.load_state_dict(module.state_dict())
    for i in range(3):
        for a, b in zip(step(module, budget_gib=200 * i / 2**30), step(other, budget_gib=1.0), strict=True):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            for p in (*module.parameters(), *other.parameters()):
                p.mul_(1.1)
    assert looks == [3, 3]  # one of each


CHANGES = [
    *("a number", "a mode", "a part", "a weight", "a hook", "another hook", "other pixels"),
    *("a function", "a forward", "its class", "a list", "what a list holds"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_looked_at_again(change: str, looks: list[int]) -> None:
    module, pixels = Net().double(), PIXELS
    if change == "another hook":
        module.layer.register_forward_hook(lambda *_: None)
    step(module)
    if change == "a number":
        module.factor = 2.0
    elif change == "a mode":
        module.eval()
    elif change == "a part":
        module.layer.__class__ = type("Other", (nn.Linear,), {})
    elif change == "a weight":
        module.layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    elif change in ("a hook", "another hook"):
        module.layer.register_forward_hook(lambda *_: None)
    elif change == "a function":
        module.act = lambda x: x
    elif change == "a forward":
        module.layer.forward = lambda x: x  # type: ignore[method-assign]
    elif change == "its class":
        module.__class__ = type("Other", (Net,), {})
    elif change == "a list":
        module.scales[0] = torch.zeros(4, dtype=torch.float64)
    elif change == "what a list holds":
        module.scales[0].requires_grad_()
    else:
        pixels = PIXELS[:, None]
    with pytest.raises(ConfigError) if change == "what a list holds" else nullcontext():
        step(module, pixels)
    assert looks == [3, 3]


def test_functions_that_are_made_anew_are_looked_at(looks: list[int]) -> None:
    class Around(nn.Module):
        def __init__(self, inner: Net, act: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.inner, self.act = inner, act

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.inner(x))

    inner = Net().double()
    for i in range(3):  # the last one's place in memory may be the next one's
        step(Around(inner, lambda x, i=i: x * i))  # type: ignore[misc]
    for _ in range(2):
        step(Around(inner, inner.layer.forward))  # a method is another object each time
    assert len(looks) == 4


def test_a_module_that_is_known_is_let_go() -> None:
    module = Net().double()
    module.act = module.layer.forward
    module.scales.append(module.layer.weight)
    step(module)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
    assert not [p for p in _known if p.shape == (4, 4)]


def test_what_is_refused_is_refused_again(looks: list[int]) -> None:
    module = Net().double()
    step(module)
    module.counts = True
    for _ in range(2):
        with pytest.raises(ConfigError, match="changes its buffers"):
            step(module)
    module.counts = False
    step(module)
    assert len(looks) == 4


class Shifted(nn.Module):
    """A weight, a buffer, dropout; and what it makes and sets itself when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)
        self.register_buffer("shift", torch.ones(4))
        self.fixed = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.ones(4, dtype=x.dtype))
        self.fixed.eval()
        found: Tensor = self.layer(self.fixed(self.drop(x))) * self.shift * self.mask
        return found


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("change", ["nothing", "training", "p", "layer", "shift", "a buffer, in place"])
def test_a_change_between_the_passes_is_noticed(change: str, nested: bool) -> None:
    module = gigaxt.key_dropout(Shifted()).double()
    if nested:
        encode, decode = Tokens(module), Total()
        (out,) = stream_nested(encode, lambda tokens: tokens, decode, lambda c: PIXELS[c], [slice(0, 4), slice(4, 9)])
    else:
        out = stream(module, lambda c: PIXELS[c], [slice(0, 4), slice(4, 9)])
    with torch.no_grad():
        if change == "training":
            module.eval()
        elif change == "p":
            module.drop.p = 0.1
        elif change == "layer":
            module.layer = nn.Linear(4, 4).double()
        elif change == "shift":
            module.shift = module.shift * 2
        elif change != "nothing":
            module.shift.mul_(2)
    with nullcontext() if change == "nothing" else pytest.raises(RuntimeError, match=rf"\({change}\)"):
        out.sum().backward()


class Tokens(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        found = self.module(x)
        return found, (found,)


class Total(nn.Module):
    def forward(self, maps: tuple[Tensor, ...], context: Tensor, _: object) -> tuple[Tensor]:
        return ((maps[0] * context).sum(),)
