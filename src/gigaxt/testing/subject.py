"""What the promises are checked with: small encoders, small scenes, and comparisons that say what they found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gigaxt.errors import GigaxtError
from gigaxt.nn.context import ContextConfig, ContextEncoder, build_context

EXACT = 1e-10
"""Largest difference that counts as rounding in float64, over the largest value."""


NOTHING: Mapping[str, Any] = {}


class Broken(Exception):  # noqa: N818  # a finding, not an error of the program
    """A promise does not hold; the text has the figures."""


class Subject:
    """The class under test, with the settings that it is tested with.

    Args:
        settings: of `ContextConfig`, `kind` and `dim` among them.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def encoder(
        self, changed: Mapping[str, Any] | None = None, *, seed: int = 0, fresh: bool = False
    ) -> ContextEncoder:
        """In float64; its parameters moved from their initial values by a tenth, unless `fresh`."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            encoder = build_context(ContextConfig(**{**self.settings, **(changed or {})})).double()
            with torch.no_grad():
                for parameter in () if fresh else encoder.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return encoder

    def tokens(self, batch: int, count: int, seed: int = 1) -> Tensor:
        """(batch, count, dim) in float64, of unit scale."""
        return drawn((batch, count, self.settings["dim"]), seed)

    def mixes(self) -> bool:
        """Whether a change of any of a few tokens is heard by another."""
        encoder, tokens = self.encoder(), self.tokens(1, 6)
        with torch.no_grad():
            before, _ = encoder(tokens, lattice(2, 3))
            for source in (0, 5):
                changed = tokens.clone()
                changed[:, source] += 1
                heard = (encoder(changed, lattice(2, 3))[0] != before).any(-1)
                if heard.sum() > heard[:, source].sum():
                    return True
        return False


class Outcome(NamedTuple):
    """Of a forward and a backward pass."""

    output: Tensor
    token_grad: Tensor
    parameter_grads: dict[str, Tensor]


def run(
    encoder: ContextEncoder,
    tokens: Tensor,
    coords: Tensor,
    validity: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    forward: Callable[..., Tensor] = lambda encoder, *arguments: encoder(*arguments)[0],
) -> Outcome:
    """Forward and backward.

    Args:
        encoder: its gradients are replaced.
        tokens: see `ContextEncoder.forward`.
        coords: likewise.
        validity: likewise.
        weights: of the outputs in the sum that gradients are taken of; None: `weights_of` them.
        forward: from `encoder` and its arguments to the output; by default one call.
    """
    tokens = tokens.detach().clone().requires_grad_()
    encoder.zero_grad()
    output = forward(encoder, tokens, coords, validity)
    (output * (weights_of(output) if weights is None else weights)).sum().backward()
    expect(tokens.grad is not None, "no gradient reaches the tokens")
    assert tokens.grad is not None
    grads = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    return Outcome(output.detach(), tokens.grad, grads)


def run_in_two_orders(subject: Subject, coords: Tensor) -> Outcome:
    """Outputs and gradients of shuffled tokens must be those of the tokens, shuffled; returns the latter."""
    encoder, count = subject.encoder(), coords.shape[1]
    tokens = subject.tokens(1, count)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(6))
    expected = run(encoder, tokens, coords)
    found = run(encoder, tokens[:, shuffled], coords[:, shuffled], weights=weights_of(tokens)[:, shuffled])
    back = shuffled.argsort()
    sorted_back = Outcome(found.output[:, back], found.token_grad[:, back], found.parameter_grads)
    expect_same(sorted_back, expected, "of the same tokens in two orders")
    return expected


def in_strips(sizes: list[int], encoder: ContextEncoder, *arguments: Tensor) -> Tensor:
    """The outputs of strips of `sizes` tokens, each continued from the state that the one before it returned."""
    state, outputs = None, []
    for strip in zip(*(t.split(sizes, dim=1) for t in arguments), strict=True):
        output, state = encoder(*strip, state)
        expect(all(isinstance(leaf, Tensor) for leaf in tree_leaves(state)), "the state holds more than tensors")
        outputs.append(output)
    return torch.cat(outputs, dim=1)


def gradient_of(output: Tensor, tokens: Tensor, places: slice) -> Tensor:
    """Of the outputs at `places`, with respect to all tokens."""
    chosen = (output * weights_of(output))[:, places].sum()
    return torch.autograd.grad(chosen, tokens, retain_graph=True)[0]


def weights_of(output: Tensor) -> Tensor:
    """Random ones, so that no two outputs stand for each other."""
    return drawn(output.shape, seed=5).to(output.dtype)


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def lattice(rows: int, cols: int) -> Tensor:
    """(1, rows * cols, 2) as (row, col), row by row, in float64."""
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij"), -1)
    return grid.reshape(1, -1, 2).double()  # (rows, cols, 2) -> (1, rows * cols, 2)


def scattered() -> Tensor:
    """A lattice of 7 x 11 with a gap, and an overview's tokens between its points: (1, 77, 2)."""
    full = lattice(7, 11)[0]
    gap = (full >= torch.tensor([2, 3])).all(-1) & (full < torch.tensor([4, 6])).all(-1)
    return torch.cat((full[~gap], 4 * lattice(2, 3)[0] + 1.5)).unsqueeze(0)


def ragged() -> Tensor:
    """Validity (3, 77): rows with many, few and one valid token."""
    validity = torch.rand(3, 77, generator=torch.Generator().manual_seed(4)) > torch.tensor([[0.2], [0.6], [1.0]])
    validity[2, 40] = True
    return validity


def expect(holds: bool | Tensor, found: str) -> None:
    """Raise `Broken` with what was found, unless it holds."""
    if not holds:
        raise Broken(found)


def expect_equal(found: Tensor, expected: Tensor, what: str, tolerance: float = EXACT) -> None:
    """`what` completes "... differ by"."""
    size = difference(found, expected)
    expect(size <= tolerance, f"{what} differ by up to {size:.2g} of the largest value, allowed {tolerance:.0e}")


def expect_same(found: Outcome, expected: Outcome, what: str) -> None:
    """Outputs and gradients agree up to rounding."""
    expect_equal(found.output, expected.output, f"outputs {what}")
    expect_equal(found.token_grad, expected.token_grad, f"token gradients {what}")
    for name, grad in expected.parameter_grads.items():
        expect(name in found.parameter_grads, f"`{name}` gets no gradient {what}")
        expect_equal(found.parameter_grads[name], grad, f"gradients of `{name}` {what}")


def expect_raises(error: type[GigaxtError], call: Callable[[], object], what: str) -> None:
    """`call` raises `error`; `what` is what it was given."""
    try:
        call()
    except error:
        return
    except Exception as other:
        text = " ".join(str(other).split())
        raise Broken(f"{what} raised {type(other).__name__} instead of {error.__name__}: {text}") from other
    raise Broken(f"{what} was accepted, expected {error.__name__}")


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest value; NaN where either holds one.

    Over a hundredth at least, since some gradients are zero but for rounding.
    """
    if found.shape != expected.shape:
        raise Broken(f"expected {described(expected)}, got {described(found)}")
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-2))


def described(value: object) -> str:
    """A tensor's shape and dtype, or whatever else came."""
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)
