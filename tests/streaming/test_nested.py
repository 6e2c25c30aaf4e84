from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gigaxt.errors import ConfigError
from gigaxt.streaming.keyed import key_dropout
from gigaxt.streaming.nested import stream_nested
from gigaxt.streaming.single import Streaming
from gigaxt.testing.live_memory import LiveMemory
from scarce_memory import ScarceMemory

REGIONS = 7
ORDINARY = Streaming(budget_gib=None)
BUDGETS = {
    "ordinary": ORDINARY,
    "nothing": Streaming(),
    "maps": Streaming(host_gib=1.0),
    "graphs": Streaming(budget_gib=1.0),
    "some maps": Streaming(host_gib=12e-6),
    "some of each": Streaming(budget_gib=3e-5, host_gib=6e-6),
}


class Encode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse, self.out = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 2, stride=2), nn.Linear(6, 5)
        self.drop = nn.Dropout(0.3)
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        self.forwards += len(x)
        fine = self.drop(self.fine(x).tanh())
        coarse = self.coarse(fine).tanh()
        if fine.requires_grad:
            fine.register_hook(lambda _: self._count(len(x)))
        return self.out(coarse.mean((2, 3))), (fine, coarse)

    def _count(self, regions: int) -> None:
        self.backwards += regions


class Decode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse, self.film = nn.Conv2d(4, 3, 1), nn.Conv2d(6, 3, 1), nn.Linear(5, 3)

    def logits(self, maps: Sequence[Tensor], context: Tensor) -> Tensor:
        y = self.fine(maps[0]) + F.interpolate(self.coarse(maps[1]), scale_factor=2.0)
        out: Tensor = y * self.film(context)[:, :, None, None]
        return out

    def forward(self, maps: Sequence[Tensor], context: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        y = self.logits(maps, context)
        p, true = y.softmax(1)[:, 1], target == 1
        return F.cross_entropy(y, target, reduction="sum"), (p * true).sum(), p.sum(), true.sum()


class Logits(Decode):
    def forward(self, maps: Sequence[Tensor], context: Tensor, target: object) -> tuple[Tensor, ...]:
        assert target is None
        return (self.logits(maps, context),)


class Problem:
    def __init__(self, decode: type[Decode] = Decode) -> None:
        torch.manual_seed(0)
        self.encode, self.decode, self.mix = Encode().double(), decode().double(), nn.Linear(5, 5).double()
        self.all = key_dropout(nn.ModuleList([self.encode, self.decode, self.mix]))
        self.pixels = torch.randn(REGIONS, 3, 8, 8, dtype=torch.float64)
        self.target = torch.randint(0, 3, (REGIONS, 8, 8))

    def join(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.mix(tokens) * (1 + tokens.mean(0, keepdim=True).tanh())
        return out

    def run(self, chunk: int, streaming: Streaming, **options: Any) -> tuple[Tensor, ...]:
        chunks = [slice(i, min(i + chunk, REGIONS)) for i in range(0, REGIONS, chunk)]
        return stream_nested(
            self.encode,
            self.join,
            self.decode,
            lambda c: self.pixels[c],
            chunks,
            seed=1,
            streaming=streaming,
            **options,
        )

    def loss(self, chunk: int, streaming: Streaming, linear: bool) -> Tensor:
        cross, both, predicted, true = self.run(chunk, streaming, load_targets=lambda c: self.target[c], linear=linear)
        return cross / 400 if linear else cross / 400 + 1 - 2 * both / (predicted + true)

    def grads(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.all.parameters() if p.grad is not None]


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "ratio"])
@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("streaming", BUDGETS.values(), ids=BUDGETS.keys())
def test_equals_ordinary_autograd(streaming: Streaming, chunk: int, linear: bool) -> None:
    found, expected = Problem(), Problem()
    a, b = found.loss(chunk, streaming, linear), expected.loss(7, ORDINARY, linear)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    a.backward()
    b.backward()
    assert len(found.grads()) == len(expected.grads()) == len(list(found.all.parameters()))
    for x, y in zip(found.grads(), expected.grads(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("streaming", "linear", "forwards"),
    [
        (BUDGETS["graphs"], True, 1),
        (BUDGETS["graphs"], False, 1),
        (BUDGETS["maps"], True, 2),
        (BUDGETS["maps"], False, 2),
        (BUDGETS["nothing"], True, 3),
        (BUDGETS["nothing"], False, 4),
    ],
)
def test_passes_over_the_encoder(streaming: Streaming, linear: bool, forwards: int) -> None:
    """The table in DESIGN.md and in the module: never a second backward pass."""
    problem = Problem()
    problem.loss(3, streaming, linear).backward()
    assert problem.encode.forwards == forwards * REGIONS
    assert problem.encode.backwards == REGIONS


@pytest.mark.parametrize("streaming", BUDGETS.values(), ids=BUDGETS.keys())
def test_joined_outputs(streaming: Streaming) -> None:
    """Logits of all regions, differentiated by any loss outside."""
    found, expected = Problem(Logits), Problem(Logits)
    weights = torch.linspace(-1, 1, REGIONS * 3 * 64, dtype=torch.float64).view(REGIONS, 3, 8, 8)
    for problem, chunk, budget in ((found, 3, streaming), (expected, 7, ORDINARY)):
        (logits,) = problem.run(chunk, budget, reduce="cat")
        assert logits.shape == (REGIONS, 3, 8, 8)
        (logits * weights).sum().backward()
    for x, y in zip(found.grads(), expected.grads(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


def test_decoder_learns_where_the_context_is_cut_off() -> None:
    """Nothing flows back through the tokens; the encoder still gets what comes through its feature maps."""
    found, expected = Problem(), Problem()
    for problem, streaming in ((found, Streaming()), (expected, ORDINARY)):
        problem.join = lambda tokens: tokens.detach() * 2
        problem.loss(3, streaming, linear=True).backward()
    assert found.encode.fine.weight.grad is not None
    for x, y in zip(found.grads(), expected.grads(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "ratio"])
@pytest.mark.parametrize("streaming", BUDGETS.values(), ids=BUDGETS.keys())
def test_a_loss_of_the_tokens_alone(streaming: Streaming, linear: bool) -> None:
    """`join` may give tokens away, and what the decoder answers need not be used."""
    found = []
    for settings in (ORDINARY, streaming):
        problem, given = Problem(), list[Tensor]()

        def join(tokens: Tensor, problem: Problem = problem, given: list[Tensor] = given) -> Tensor:
            given.append(tokens.square().sum())
            return Problem.join(problem, tokens)

        problem.join = join  # type: ignore[method-assign]
        problem.loss(3, settings, linear)
        given[0].backward()
        found.append([torch.zeros_like(p) if p.grad is None else p.grad for p in problem.all.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Nothing(torch.autograd.Function):
    """Lets no gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("streaming", BUDGETS.values(), ids=BUDGETS.keys())
def test_a_linear_loss_without_a_gradient(streaming: Streaming) -> None:
    problem = Problem()
    Nothing.apply(problem.loss(3, streaming, linear=True)).backward()
    assert not any(g.any() for g in problem.grads())


def test_one_backward_pass() -> None:
    problem, given = Problem(), list[Tensor]()

    def join(tokens: Tensor) -> Tensor:
        given.append(tokens.square().sum())
        return Problem.join(problem, tokens)

    problem.join = join  # type: ignore[method-assign]
    for second in (0, 1):
        loss = problem.loss(3, Streaming(), linear=False)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="expected one backward pass"):
            (loss, given[-1])[second].backward()


@pytest.mark.parametrize("streaming", [Streaming(), Streaming(host_gib=1.0), Streaming(budget_gib=1.0)])
def test_frozen_encoder(streaming: Streaming) -> None:
    found, expected = Problem(), Problem()
    for problem, budget in ((found, streaming), (expected, ORDINARY)):
        problem.encode.requires_grad_(False)
        problem.loss(3, budget, linear=False).backward()
        assert problem.encode.fine.weight.grad is None
    for x, y in zip(found.grads(), expected.grads(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


class Noisy(Encode):
    def forward(self, x: Tensor) -> Any:
        return super().forward(F.dropout(x, 0.5))


class Hidden(Encode):
    scales = (torch.ones((), dtype=torch.float64, requires_grad=True),)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x * self.scales[0])


@pytest.mark.parametrize("encode", [Noisy, Hidden, Encode])
def test_a_frozen_encoder_is_looked_at_as_well(encode: type[Encode]) -> None:
    problem = Problem()
    problem.encode = encode().double().requires_grad_(False)
    if encode is Encode:
        problem.pixels.requires_grad_()
    with pytest.raises(ConfigError, match=r"global random state|not among its own|pixels get no gradient"):
        problem.loss(3, Streaming(), True)


@pytest.mark.parametrize("streaming", BUDGETS.values(), ids=BUDGETS.keys())
def test_a_decoder_of_the_context_alone(streaming: Streaming) -> None:
    """An encoder without feature maps."""

    class Tokens(Encode):
        def forward(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
            return super().forward(x)[0], ()

    class Context(nn.Module):
        def forward(self, maps: tuple[()], context: Tensor, targets: None) -> tuple[Tensor]:
            assert maps == ()
            return (context.square().sum(),)

    gradients = []
    for budget in (streaming, ORDINARY):
        torch.manual_seed(0)
        encode, pixels = Tokens().double(), torch.randn(REGIONS, 3, 8, 8, dtype=torch.float64)
        encode.drop = nn.Identity()
        chunks = [slice(0, 4), slice(4, REGIONS)]
        (loss,) = stream_nested(encode, torch.tanh, Context(), lambda c, p=pixels: p[c], chunks, streaming=budget)
        loss.backward()
        gradients.append([p.grad for p in encode.parameters()])
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "ratio"])
@pytest.mark.parametrize("streaming", [Streaming(), Streaming(host_gib=1.0), Streaming(budget_gib=1.0)])
def test_what_the_decoder_reaches_beside_its_inputs_is_refused(streaming: Streaming, linear: bool) -> None:
    """Its gradient would be lost."""
    foreign = torch.ones((), dtype=torch.float64, requires_grad=True)

    class Reaching(Decode):
        def forward(self, maps: Sequence[Tensor], context: Tensor, target: Tensor) -> tuple[Tensor, ...]:
            return super().forward(maps, context * foreign, target)

    problem = Problem(Reaching)
    with pytest.raises(ConfigError, match="not among its own"):
        problem.loss(3, streaming, linear).backward()


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "ratio"])
@pytest.mark.parametrize("streaming", BUDGETS.values(), ids=BUDGETS.keys())
def test_after_the_backward_pass_nothing_of_the_scene_is_held(streaming: Streaming, linear: bool) -> None:
    """Not even while the loss is still there, as it is in a loop `for ...: loss = model(...)`."""
    problem = Problem()
    with LiveMemory([problem.pixels, problem.target, *problem.all.parameters()]) as memory:
        loss = problem.loss(3, streaming, linear)
        loss.backward()
        gradients = sum(p.grad.nbytes for p in problem.all.parameters() if p.grad is not None)
        scalars = 20 * loss.nbytes
        assert memory.now <= gradients + scalars
    token_store = REGIONS * 5 * 8
    assert token_store > scalars


def test_without_gradients() -> None:
    problem = Problem()
    with torch.no_grad():
        streamed, ordinary = (problem.loss(chunk, Streaming(), linear=False) for chunk in (2, 7))
    torch.testing.assert_close(streamed, ordinary)
    assert not streamed.requires_grad


def test_out_of_memory_is_retried_in_smaller_parts() -> None:
    class Tight(Encode):
        def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    for streaming in (Streaming(), Streaming(host_gib=1.0)):
        found, expected = Problem(), Problem()
        tight = Tight().double()
        tight.load_state_dict(found.encode.state_dict())
        found.encode = tight
        found.all = key_dropout(nn.ModuleList([found.encode, found.decode, found.mix]))
        found.loss(7, streaming, linear=False).backward()
        expected.loss(7, ORDINARY, linear=False).backward()
        for x, y in zip(found.grads(), expected.grads(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


def test_parts_of_the_first_chunk_are_not_kept_where_memory_is_short() -> None:
    """The encoder's graph of the whole chunk holds 16 MiB and more."""

    class Deep(nn.Sequential):
        def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
            y = super().forward(x)
            return y[:, None], (y,)

    class Add(nn.Module):
        def forward(self, maps: tuple[Tensor], context: Tensor, targets: None) -> tuple[Tensor]:
            return ((maps[0] * context[:, 0]).sum(),)

    torch.manual_seed(0)
    encode = Deep(*(layer for _ in range(10) for layer in (nn.Linear(50, 50), nn.Tanh()))).double()
    pixels, chunks, found = torch.randn(4096, 50, dtype=torch.float64), [slice(0, 4096)], []
    for most in (1 << 40, 10 << 20):
        streaming = Streaming()
        encode.zero_grad()
        with ScarceMemory(most):
            sums = stream_nested(encode, lambda t: 2 * t, Add(), lambda c: pixels[c], chunks, streaming=streaming)
            sums[0].backward()
        found.append([p.grad.clone() for p in encode.parameters()])
    assert streaming.most_regions in (256, 512, 1024)
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("streaming", [Streaming(), Streaming(host_gib=1.0), Streaming(budget_gib=1.0)])
def test_an_encoder_and_a_decoder_without_weights(streaming: Streaming) -> None:
    class Means(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
            return x.mean((2, 3)), (x,)

    class Product(nn.Module):
        def forward(self, maps: Sequence[Tensor], context: Tensor, target: object) -> tuple[Tensor]:
            return ((maps[0].sum((2, 3)) * context).sum(),)

    found = []
    for settings in (ORDINARY, streaming):
        problem, learnt = Problem(), nn.Linear(3, 3).double()
        nn.init.constant_(learnt.weight, 0.5)
        nn.init.constant_(learnt.bias, 0.5)
        problem.encode, problem.decode, problem.join = Means(), Product(), learnt  # type: ignore[assignment]
        problem.run(3, settings)[0].backward()
        found.append([p.grad for p in learnt.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_use() -> None:
    problem = Problem()
    with pytest.raises(ConfigError, match="one sum"):
        problem.run(3, Streaming(), linear=True, reduce="cat")
    problem.join = lambda tokens: tokens[:3]
    with pytest.raises(ConfigError, match="expected 7 rows"):
        problem.loss(3, Streaming(), linear=True)
    twice = Problem()
    loss = twice.loss(3, Streaming(), linear=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()
