from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gigaxt.errors import ConfigError
from gigaxt.streaming.host_copies import HostCopies
from gigaxt.streaming.recurrence import _padded, scan
from gigaxt.streaming.rows import Budget
from gigaxt.testing.live_memory import LiveMemory

KEPT = [0, 2000, 10**6, None]
"""Bytes that segments may keep: none, some, all; None for ordinary autograd."""


def budget(size: int | None) -> Budget | None:
    return None if size is None else Budget(size / 2**30)


class Recurrence(nn.Module):
    """A small nonlinear recurrence with a matrix state and a shared input."""

    def __init__(self, dim: int = 3) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, dim)
        self.outer = nn.Linear(dim, dim)

    def forward(self, x: Tensor, valid: Tensor, shared: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for token, keep in zip(x.unbind(1), valid.unbind(1), strict=True):
            h = torch.where(keep[:, None], torch.tanh(self.inner(token) + self.outer(h) * shared), h)
            outputs.append(h * token)
        return torch.stack(outputs, dim=1), h


class Total(nn.Module):
    """A reduction: a state and no output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x: Tensor, total: Tensor) -> tuple[None, Tensor]:
        return None, total + (x * self.weight).square().sum(1)


class Case:
    """Fresh module and inputs with the same values each time."""

    def __init__(self, tokens: int = 11) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        self.module = Recurrence().double()
        with torch.no_grad():
            for p in self.module.parameters():
                p.copy_(draw(*p.shape))
        self.x = draw(2, tokens, 3).requires_grad_()
        self.valid = draw(2, tokens) > -1
        self.shared = draw(3).requires_grad_()
        self.state = draw(2, 3).requires_grad_()
        self.weights = draw(2, tokens, 3), draw(2, 3)

    def run(self, segment: int = 4, **kwargs: object) -> tuple[Tensor, Tensor]:
        y, (h,) = scan(
            self.module, (self.x, self.valid), (self.state,), shared=(self.shared,), segment=segment, **kwargs
        )
        assert y is not None
        return y, h

    def loss(self, y: Tensor, h: Tensor) -> Tensor:
        return (y * self.weights[0]).sum() + (h * self.weights[1]).sum()

    def grads(self) -> list[Tensor | None]:
        return [t.grad for t in (self.x, self.shared, self.state, *self.module.parameters())]


def plain(reverse: bool = False) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The reference: the module on the whole sequence, under ordinary autograd."""
    case = Case()
    flip = (lambda t: t.flip(1)) if reverse else (lambda t: t)
    y, h = case.module(flip(case.x), flip(case.valid), case.shared, case.state)
    case.loss(flip(y), h).backward()
    return flip(y).detach(), h.detach(), case.grads()


def close(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("segment", [1, 4, 11, 20])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("reverse", [False, True])
def test_equals_the_plain_loop(segment: int, kept: int | None, reverse: bool) -> None:
    case = Case()
    y, h = case.run(segment, budget=budget(kept), reverse=reverse)
    case.loss(y, h).backward()
    expected_y, expected_h, expected_grads = plain(reverse)
    close([y, h], [expected_y, expected_h])
    close(case.grads(), expected_grads)


class Once(nn.Module):
    """A map of one module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.inner(x),)


class Elsewhere(HostCopies):
    """Copies of everything, as a host has them of what is on a device."""

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.clone()


@pytest.mark.parametrize("halo", [(0, 0), (3, 2)])
@pytest.mark.parametrize("reverse", [False, True])
def test_inputs_that_wait_elsewhere(halo: tuple[int, int], reverse: bool) -> None:
    class Window(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            before, after = halo
            return (super().forward(x)[:, before : x.shape[1] - after].tanh(),)

    results = []
    for host in (None, Elsewhere(1.0)):
        torch.manual_seed(0)
        module, leaf = Window(3, 3).double(), draw_tokens().requires_grad_()
        x = leaf * 2
        device_tensor = weakref.ref(x)
        y, _ = scan(module, (x,), segment=4, host=host, reverse=reverse, halo=halo)
        del x
        assert (device_tensor() is None) == (host is not None)
        assert y is not None
        y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in module.parameters())])
    close(results[1], results[0])


def test_what_waits_elsewhere_is_let_go_with_the_graph() -> None:
    """Not held for as long as the loss is, as in a loop `for ...: loss = model(...)`."""
    x, module = draw_tokens().requires_grad_(), Once(nn.Linear(3, 3).double())
    with LiveMemory([x, *module.parameters()]) as memory:
        y, _ = scan(module, (x,), segment=4, host=Elsewhere(1.0))
        assert y is not None
        loss = y.sum()
        del y
        loss.backward()
        gradients = sum(t.grad.nbytes for t in (x, *module.parameters()) if t.grad is not None)
        assert memory.now == gradients + loss.nbytes


def test_rows_of_a_batch_come_back_one_by_one() -> None:
    """PyTorch joins rows that lie apart on the host first, and may read there what the device has not written yet."""
    asked = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is Tensor.to and args[1:] and args[1] == torch.device("meta"):
                asked.append(args[0].is_contiguous())
            return func(*args, **(kwargs or {}))

    tokens = torch.zeros(3, 11, 2)
    with Spy():
        pieces = [_padded(tokens, *bounds, torch.device("meta")) for bounds in ((0, 11), (4, 8), (-2, 5), (8, 13))]
        row = _padded(tokens[:1], 4, 8, torch.device("meta"))
    assert [tuple(piece.shape) for piece in [*pieces, row]] == [(3, 11, 2), (3, 4, 2), (3, 7, 2), (3, 5, 2), (1, 4, 2)]
    assert len(asked) >= 5
    assert all(asked)


def draw_tokens() -> Tensor:
    return torch.randn(2, 11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_reduction_has_no_output() -> None:
    module, x = Total(), torch.arange(10, dtype=torch.float64).reshape(1, 10, 1).requires_grad_()
    output, (total,) = scan(module, (x,), (torch.zeros(1, 1, dtype=torch.float64),), segment=3)
    assert output is None
    total.sum().backward()
    close([total, x.grad, module.weight.grad], [(2 * x).square().sum(1), 8 * x, 4 * x.square().sum()])


def test_map_has_no_state() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x * 2,)

    x = torch.randn(1, 10, 2, requires_grad=True)
    output, state = scan(Double(), (x,), segment=3)
    assert output is not None
    assert state == ()
    output.sum().backward()
    close([output, x.grad], [x * 2, torch.full_like(x, 2)])


def test_only_the_state_is_used() -> None:
    case, expected = Case(), Case()
    case.run()[1].sum().backward()
    expected.run(budget=None)[1].sum().backward()
    close(case.grads(), expected.grads())


def test_frozen_tensors_get_no_gradient() -> None:
    case = Case()
    case.module.inner.requires_grad_(False)
    case.x.requires_grad_(False)
    case.state.requires_grad_(False)
    case.loss(*case.run()).backward()
    x, shared, state, inner_weight, inner_bias, *outer = case.grads()
    assert [x, state, inner_weight, inner_bias] == [None] * 4
    expected = plain()[2]
    close([shared, *outer], [expected[1], *expected[5:]])


def test_hooks_fire_once_a_backward_pass() -> None:
    case, fired = Case(), []
    for name, p in case.module.named_parameters():
        p.register_hook(lambda grad, name=name: fired.append(name))
    case.loss(*case.run()).backward()
    assert sorted(fired) == sorted(name for name, _ in case.module.named_parameters())


def test_accumulates_and_repeats() -> None:
    case, once = Case(), plain()[2]
    for kept in (0, 2000):
        loss = case.loss(*case.run(budget=budget(kept)))
        loss.backward(retain_graph=True)
        loss.backward()
    close(case.grads(), [None if g is None else 4 * g for g in once])


@pytest.fixture
def process_group(tmp_path: object) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_under_distributed_data_parallel() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.case = Case()
            self.inside = self.case.module

        def forward(self, shared: Tensor) -> Tensor:
            self.case.shared = shared
            return self.case.loss(*self.case.run())

    model = Model()
    shared = model.case.shared
    nn.parallel.DistributedDataParallel(model)(shared).backward()
    close([p.grad for p in model.inside.parameters()], plain()[2][3:])


def test_change_in_place_is_noticed() -> None:
    for changed in ("x", "parameter"):
        case = Case()
        loss = case.loss(*case.run())
        with torch.no_grad():
            (case.x if changed == "x" else case.module.inner.weight).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_the_plain_loop_runs_on_devices_without_autocast() -> None:
    class Linear(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (super().forward(x),)

    y, _ = scan(Linear(3, 2, device="meta"), (torch.empty(1, 5, 3, device="meta"),), segment=2, budget=None)
    assert y is not None
    assert y.shape == (1, 5, 2)


def test_autocast_of_the_forward_pass_is_restored() -> None:
    case, seen = Case(), []
    case.module.float()
    case.module.inner.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    x, shared, state = (t.detach().float().requires_grad_() for t in (case.x, case.shared, case.state))
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = scan(case.module, (x, case.valid), (state,), shared=(shared,), segment=4)
    assert y is not None
    y.sum().backward()
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 2 * x.shape[1]  # forward, and again in the backward pass


def test_autocast_keeps_no_casts_of_segments() -> None:
    """Each takes 128 KiB as bfloat16."""
    held: list[int] = []

    class Narrow(nn.Linear):
        def forward(self, x: Tensor, shared: Tensor) -> tuple[Tensor]:
            held.append(memory.now)
            return (super().forward(x) + super().forward(shared).detach(),)

    module, x = Narrow(1 << 16, 1), torch.ones(1, 6, 1 << 16, requires_grad=True)
    shared = torch.ones(1, 1, 1 << 16, requires_grad=True)
    with LiveMemory([x, shared, *module.parameters()]) as memory, torch.autocast("cpu", torch.bfloat16):
        y, _ = scan(module, (x,), shared=(shared,), segment=1)
        assert y is not None
        y.sum().backward()
    assert len(held) == 12
    for one_pass in (held[:6], held[6:]):
        assert max(one_pass[3:]) < one_pass[2] + (1 << 15)


def test_low_precision_sums_are_added_in_float32() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x * self.weight,)

    module = Scale()
    y, _ = scan(module, (torch.ones(1, 1000, 1, dtype=torch.bfloat16),), segment=1)
    y.sum().backward()
    assert module.weight.grad is not None
    assert module.weight.grad.item() == 1000  # bfloat16 sums of ones stop at 256


def test_borders_do_not_keep_whole_segments() -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
            y = x + last
            return y, y[:, -1:]

    saved: dict[int, int] = {}
    x = torch.zeros(1, 4000, 1, requires_grad=True)

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        scan(Last(), (x,), (torch.zeros(1, 1, 1),), segment=1000)
    assert sorted(saved.values()) == [4, 3 * 4, 16000]  # the first state, those of the borders, the tokens


def test_states_may_change_their_shape() -> None:
    class Memory(nn.Module):
        """Hands over all tokens so far."""

        def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
            return x + before.sum(dim=1, keepdim=True), torch.cat([before, x], dim=1)

    def run(**options: Any) -> tuple[Tensor, Tensor]:
        x = torch.arange(1.0, 11.0, dtype=torch.float64).reshape(1, 10, 1).requires_grad_()
        y, _ = scan(Memory(), (x,), (x.new_zeros(1, 0, 1),), **options)
        assert y is not None
        y.square().sum().backward()
        assert x.grad is not None
        return y.detach(), x.grad

    close(list(run(segment=3)), list(run(segment=3, budget=None)))
    assert run(segment=3)[0].flatten().tolist() == [1, 2, 3, 10, 11, 12, 28, 29, 30, 55]


def test_states_may_change_their_type() -> None:
    class Precise(nn.Module):
        """Counts in float32, and in float64 from where that is not enough."""

        def forward(self, x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
            total = total.double() if bool((total >= 2**24).all()) else total
            total = total + x.sum(dim=1).to(total.dtype)
            return x * total.unsqueeze(1).to(x.dtype), total

    x = torch.tensor([2.0**24, 1, 1, 1], dtype=torch.float64).reshape(1, 4, 1).requires_grad_()
    _, (total,) = scan(Precise(), (x,), (torch.zeros(1, 1),), segment=1)
    assert total.item() == 2**24 + 3


@pytest.mark.parametrize("kept", KEPT)
def test_states_may_be_complex(kept: int | None) -> None:
    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turn = nn.Parameter(torch.tensor([0.5 + 0.5j, 0.2 - 0.9j], dtype=torch.complex128))

        def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            found = []
            for token in x.unbind(1):
                state = state * self.turn + token
                found.append(state.real)
            return torch.stack(found, 1), state

    found = []
    for segment, keep in ((8, None), (3, kept)):
        module = Turning()
        x = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(1, 8, 2).requires_grad_()
        state = torch.ones(1, 2, dtype=torch.complex128, requires_grad=True)
        y, (end,) = scan(module, (x,), (state,), segment=segment, budget=budget(keep))
        assert y is not None
        (y.pow(3).sum() + end.abs().pow(3).sum()).backward()
        found.append([y, end, x.grad, state.grad, module.turn.grad])
    close(*found)


def test_gradients_of_a_segment_do_not_stand_beside_the_next_one() -> None:
    held: list[int] = []

    class Wide(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            held.append(memory.now)
            return (super().forward(x).sum(-1, keepdim=True),)

    module, x = Wide(1, 1 << 16), torch.ones(1, 4, 1, requires_grad=True)
    with LiveMemory([x, *module.parameters()]) as memory:
        y, _ = scan(module, (x,), segment=1)
        assert y is not None
        y.sum().backward()
    assert len(held) == 8
    assert max(held) < sum(p.nbytes for p in module.parameters()) + (1 << 12)


def test_no_graph_without_gradients() -> None:
    case = Case()
    with torch.no_grad():
        y, h = case.run(budget=budget(2000))
    assert not y.requires_grad
    close([y, h], plain()[:2])


def test_foreign_leaf_is_refused() -> None:
    foreign = torch.ones(3, requires_grad=True)

    class Uses(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x * foreign,)

    y, _ = scan(Uses(), (torch.ones(1, 4, 3, requires_grad=True),), segment=2)
    with pytest.raises(ConfigError, match="requires grad but is not among its own parameters"):
        y.sum().backward()


def test_wrong_use_is_refused() -> None:
    case = Case()
    with pytest.raises(ConfigError, match="segment of at least 1 token, got 0"):
        case.run(0)
    with pytest.raises(ConfigError, match="one number of tokens"):
        scan(case.module, (case.x, case.valid[:, :3]), segment=4)
    with pytest.raises(ConfigError, match="at least 1"):
        scan(case.module, (case.x[:, :0],), segment=4)

    class Pools(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x.mean(1),)

    for kept in KEPT:
        with pytest.raises(ConfigError, match="for a segment of 4 tokens"):
            scan(Pools(), (case.x,), segment=4, budget=budget(kept))


class Window(nn.Module):
    """A weighted sum of the tokens around each one, in the order of processing; the state adds up all outputs."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, before + after + 2, dtype=torch.float64))

    def forward(self, x: Tensor, valid: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        around = (x * valid.unsqueeze(-1)).unfold(1, len(self.weight), 1)  # (batch, tokens, dim, window)
        y = around @ self.weight
        return y, total + y.sum(1)


def in_order(x: Tensor, reverse: bool) -> Tensor:
    return x.flip(1) if reverse else x


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("halo", [(2, 1), (0, 3), (5, 0), (13, 12)])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("segment", [1, 4, 11])
def test_halo(reverse: bool, halo: tuple[int, int], segment: int, kept: int | None) -> None:
    case = Case()
    results = []
    for streamed in (False, True):
        module, x, state = Window(*halo), *(t.detach().clone().requires_grad_() for t in (case.x, case.state))
        if streamed:
            inputs = (x, case.valid)
            y, (total,) = scan(
                module, inputs, (state,), segment=segment, budget=budget(kept), reverse=reverse, halo=halo
            )
        else:  # the whole sequence with zeros around it, under ordinary autograd
            padded = F.pad(in_order(x, reverse), (0, 0, *halo))
            y, total = module(padded, F.pad(in_order(case.valid, reverse), halo), state)
            y = in_order(y, reverse)
        case.loss(y, total).backward()
        results.append([y, total, x.grad, state.grad, module.weight.grad])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def test_segments_keep_what_the_purse_pays() -> None:
    runs: list[int] = []

    class Counting(Recurrence):
        def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            runs.append(x.shape[1])
            return super().forward(x, *rest)

    held = Budget(1)
    left = held.left
    case = Case()
    case.module.__class__ = Counting
    y, h = case.run(4, budget=held)
    case.loss(y, h).backward()
    assert runs == [4, 4, 3]  # nothing twice
    size = (left - held.left) // 3
    for affordable, expected in ((0, [4, 4, 3, 3, 4, 4]), (1, [4, 4, 3, 3, 4]), (2, [4, 4, 3, 3]), (3, [4, 4, 3])):
        runs.clear()
        y, h = case.run(4, budget=budget(affordable * size))
        case.loss(y, h).backward()
        assert runs == expected
