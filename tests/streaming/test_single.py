from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gigaxt
from gigaxt.errors import ConfigError
from gigaxt.streaming.keyed import key_dropout
from gigaxt.streaming.single import Streaming, stream
from gigaxt.testing.live_memory import LiveMemory
from scarce_memory import ScarceMemory

REGIONS = 7
BUDGETS = [Streaming(budget_gib=None), Streaming(), Streaming(budget_gib=1.0), Streaming(budget_gib=20e-6)]
CHUNKS = {
    "one": [slice(i, i + 1) for i in range(REGIONS)],
    "three": [slice(0, 3), slice(3, 6), slice(6, 7)],
    "all": [slice(0, REGIONS)],
    "growing": [slice(0, 1), slice(1, 7)],
}


class Small(nn.Module):
    """Uses its rows, its slice, what is shared, a frozen and a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4, 5)
        self.tied = self.linear
        self.frozen = nn.Parameter(torch.full((5,), 0.7), requires_grad=False)
        self.drop = nn.Dropout(0.4)
        self.rows: list[int] = []

    def forward(self, x: Tensor, own: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        self.rows.append(len(x))
        y = self.tied(self.drop(self.conv(x).mean((2, 3)).tanh())) * self.frozen + own * shared
        return y, (y**2).reshape(-1, 1)  # one row a region, and five


def problem() -> tuple[Small, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    module = key_dropout(Small().double())
    own = torch.randn(REGIONS, 5, dtype=torch.float64, requires_grad=True)
    shared = torch.randn(5, dtype=torch.float64, requires_grad=True)
    return module, torch.randn(REGIONS, 3, 8, 8, dtype=torch.float64), own, shared


def run(chunks: Sequence[Any], streaming: Streaming, reduce: Any = "cat") -> list[Tensor]:
    module, pixels, own, shared = problem()
    outputs = stream(
        module,
        lambda chunk: pixels[chunk],
        chunks,
        sliced=(own,),
        shared=(shared,),
        reduce=reduce,
        seed=3,
        streaming=streaming,
    )
    # Weights that differ by element: a gradient that lands at the wrong row shows.
    sum((o * torch.linspace(1, 2, o.numel(), dtype=torch.float64).view_as(o)).sum() for o in outputs).backward()
    grads = [p.grad for p in module.parameters() if p.requires_grad]
    assert module.frozen.grad is None
    return [o.detach() for o in outputs] + [g for g in [*grads, own.grad, shared.grad] if g is not None]


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("streaming", BUDGETS, ids=["ordinary", "nothing", "all", "some"])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
def test_equals_ordinary_autograd(chunks: list[slice], streaming: Streaming) -> None:
    assert_same(run(chunks, streaming), run(CHUNKS["all"], BUDGETS[0]))


class Checkpointed(Small):
    """Computes its first layer, stochastic depth included, again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.path = DropPath(0.5)

    def forward(self, x: Tensor, own: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        hidden = checkpoint(lambda t: self.path(self.conv(t)).tanh() ** 2, x, use_reentrant=False)
        y = self.linear(hidden.mean((2, 3))) + own * shared
        return y, y


def test_what_a_module_computes_again_is_keyed_as_well() -> None:
    _, pixels, own, shared = problem()
    found = []
    for streaming in (Streaming(), Streaming(budget_gib=1.0)):
        torch.manual_seed(0)
        module = key_dropout(Checkpointed().double())
        y, _ = stream(
            module, pixels.__getitem__, CHUNKS["three"], sliced=(own,), shared=(shared,), seed=3, streaming=streaming
        )
        y.square().sum().backward()
        found.append([p.grad for p in module.parameters() if p.grad is not None])
    assert_same(*found)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_a_traced_module_streams() -> None:
    class Smooth(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten())
            self.register_buffer("scale", torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = super().forward(x) * self.scale
            return found

    module, pixels = Smooth().double(), problem()[1]
    found = []
    for one in (module, torch.jit.trace(module, pixels[:2])):
        module.zero_grad()
        stream(one, lambda c: pixels[c], CHUNKS["three"]).square().sum().backward()
        found.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    assert_same(*found)


class Spectral(nn.Module):
    """Weights and an output that are complex."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 5, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft2(x) * self.weight


@pytest.mark.parametrize("reduce", ["cat", "sum"])
@pytest.mark.parametrize("streaming", BUDGETS, ids=["ordinary", "nothing", "all", "some"])
def test_complex_numbers(streaming: Streaming, reduce: Any) -> None:
    _, pixels, _, _ = problem()
    found = []
    for settings in (streaming, BUDGETS[0]):
        torch.manual_seed(1)
        module = Spectral()
        chunks = [slice(i, i + 1) for i in range(REGIONS)]
        out = stream(module, lambda c: pixels[c], chunks, reduce=reduce, streaming=settings)
        out.abs().pow(3).sum().backward()
        assert module.weight.grad is not None
        found.append([out.detach(), module.weight.grad])
    assert_same(*found)


@pytest.mark.parametrize("streaming", BUDGETS, ids=["ordinary", "nothing", "all", "some"])
def test_sums(streaming: Streaming) -> None:
    class Summed(Small):
        def forward(self, x: Tensor, own: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
            y, squares = super().forward(x, own, shared)
            return y.sum(0), squares.sum()

    module, pixels, own, shared = problem()
    summed = key_dropout(Summed().double())
    summed.load_state_dict(module.state_dict())

    def grads(chunks: list[slice], streaming: Streaming) -> list[Tensor]:
        summed.zero_grad()
        a, b = stream(
            summed,
            lambda c: pixels[c],
            chunks,
            sliced=(own,),
            shared=(shared,),
            reduce="sum",
            seed=1,
            streaming=streaming,
        )
        loss = (a * torch.arange(5.0, dtype=torch.float64)).sum() / b
        trained = [p for p in summed.parameters() if p.requires_grad]
        return [loss.detach(), *torch.autograd.grad(loss, [*trained, own, shared])]

    assert_same(grads(CHUNKS["three"], streaming), grads(CHUNKS["all"], BUDGETS[0]))


def test_passes_over_the_module() -> None:
    """Rows forwarded per training step: once with everything kept, twice with nothing."""
    for streaming, expected in ((Streaming(budget_gib=1.0), REGIONS), (Streaming(), 2 * REGIONS)):
        module, pixels, own, shared = problem()
        inputs = {"sliced": (own,), "shared": (shared,)}
        out, _ = stream(module, pixels.__getitem__, CHUNKS["three"], **inputs, streaming=streaming)
        out.sum().backward()
        assert sum(module.rows) == expected


def test_hooks_see_one_ordinary_operation() -> None:
    module, pixels, own, shared = problem()
    calls: list[Tensor] = []
    module.linear.weight.register_hook(calls.append)
    module.linear.weight.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad))
    out, _ = stream(module, lambda c: pixels[c], CHUNKS["one"], sliced=(own,), shared=(shared,))
    out.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
def test_outputs_may_be_changed_in_place(chunks: list[slice]) -> None:
    module, pixels, own, shared = problem()
    found = []
    for streaming in (Streaming(), Streaming(budget_gib=None)):
        module.zero_grad()
        out, _ = stream(
            module, lambda c: pixels[c], chunks, sliced=(own,), shared=(shared,), seed=3, streaming=streaming
        )
        out.mul_(2.0).relu_()
        out.sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)])
    assert_same(*found)


def test_accumulation_and_no_grad() -> None:
    module, pixels, own, shared = problem()

    def step() -> None:
        out, _ = stream(module, lambda c: pixels[c], CHUNKS["three"], sliced=(own,), shared=(shared,), seed=1)
        out.sum().backward()

    step()
    assert module.conv.weight.grad is not None
    once = module.conv.weight.grad.clone()
    step()
    torch.testing.assert_close(module.conv.weight.grad, 2 * once)
    with torch.no_grad():
        out, _ = stream(module, lambda c: pixels[c], CHUNKS["three"], sliced=(own,), shared=(shared,), seed=1)
    assert not out.requires_grad


def test_autocast_of_the_forward_pass() -> None:
    torch.manual_seed(0)
    module, pixels = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.randn(4, 12)

    def grads(streaming: Streaming) -> list[Tensor]:
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = stream(module, lambda c: pixels[c], [slice(0, 2), slice(2, 4)], streaming=streaming)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        return [p.grad.clone() for p in module.parameters() if p.grad is not None]

    for a, b in zip(grads(Streaming()), grads(Streaming(budget_gib=None)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)
    assert grads(Streaming())[0].dtype == torch.float32


class CastsOfWeights(TorchDispatchMode):
    """Casts of a weight of this shape, and those that still live."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.casts = shape, list[weakref.ref[Tensor]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and found.dtype == torch.bfloat16 and found.shape == self.shape:
            self.casts.append(weakref.ref(found))
        return found

    @property
    def alive(self) -> int:
        return sum(cast() is not None for cast in self.casts)


@pytest.mark.parametrize("one_block", [False, True], ids=["", "autocast around all steps"])
@pytest.mark.parametrize("budget_gib", [0.0, 200 / 2**30, 1.0], ids=["nothing kept", "some kept", "all kept"])
def test_autocast_casts_weights_once_a_pass(budget_gib: float, one_block: bool) -> None:
    torch.manual_seed(0)
    module, pixels = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.randn(10, 12)
    chunks = [slice(i, i + 2) for i in range(0, 10, 2)]

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    def step(streaming: Streaming) -> list[Tensor]:
        module.zero_grad()
        with autocast():
            out = stream(module, lambda c: pixels[c], chunks, streaming=streaming)
        out.float().square().sum().backward()
        return [p.grad.clone() for p in module.parameters() if p.grad is not None]

    plain = step(Streaming(budget_gib=None))
    with autocast() if one_block else nullcontext(), CastsOfWeights((3, 12)) as counted:
        for _ in range(2):
            for a, b in zip(step(Streaming(budget_gib=budget_gib)), plain, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)
        assert counted.alive == 0
    # In each step one with a graph and one without in the forward pass, and one in the backward pass, where needed: of
    # the second step the first is not where nothing is kept, for the module has been looked at.
    assert len(counted.casts) == {0.0: 5, 1.0: 2}.get(budget_gib, 6)


def test_autocast_keeps_no_casts_of_what_a_chunk_is_given() -> None:
    """Each chunk's rows and what all chunks share take 128 KiB as bfloat16."""
    held: list[int] = []

    class Narrow(nn.Linear):
        def forward(self, x: Tensor, own: Tensor, shared: Tensor) -> Tensor:
            held.append(memory.now)
            found: Tensor = super().forward(own) + super().forward(shared)
            return found

    module, wide = Narrow(1 << 16, 1), torch.ones(7, 1 << 16, requires_grad=True)
    with LiveMemory([wide, *module.parameters()]) as memory, torch.autocast("cpu", torch.bfloat16):
        chunks = [slice(i, i + 1) for i in range(6)]
        out = stream(module, lambda c: torch.ones(1, 1), chunks, sliced=(wide[:6],), shared=(wide[6:],))
        out.sum().backward()
    assert len(held) == 12
    for one_pass in (held[:6], held[6:]):
        assert max(one_pass[3:]) < one_pass[2] + (1 << 15)


def test_changed_parameter_between_the_passes_is_noticed() -> None:
    module, pixels, own, shared = problem()
    out, _ = stream(module, lambda c: pixels[c], CHUNKS["three"], sliced=(own,), shared=(shared,))
    with torch.no_grad():
        module.conv.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Scaled(nn.Module):
    def __init__(self, extra: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.hidden = [extra]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) * self.hidden[0]
        return out


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.linear(x)
        return out


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(2)


class Shrinking(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.9)
        return super().forward(x)


class Renormed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        return super().forward(x)


class Centred(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(1.0))


class Jittered(nn.Linear):
    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__(3, 2)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.draw()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Scaled(torch.ones(2, requires_grad=True)), "not among its own"),
        (Counting(), "changes its buffers"),
        (Shrinking(3, 2), "changes its buffers or weights"),
        (Renormed(3, 2), "changes its buffers or weights"),
        (Centred(3, 2), "what it is given in place"),
        (Noisy(3, 2), "global random state"),
        (Jittered(random.random), "global random state"),
        (Jittered(np.random.rand), "global random state"),
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), "BatchNorm1d in training mode"),
        (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)).eval(), "without running"),
    ],
    ids=[
        "foreign leaf",
        "buffer",
        "weight",
        "weight's data",
        "in place",
        "random",
        "python",
        "numpy",
        "batchnorm",
        "no statistics",
    ],
)
def test_refuses_what_would_give_wrong_gradients(module: nn.Module, message: str) -> None:
    before = {name: b.clone() for name, b in module.named_buffers()}
    with pytest.raises(ConfigError, match=message):
        stream(module, lambda c: torch.ones(2, 3), [0, 1])
    for name, b in module.named_buffers():
        torch.testing.assert_close(b, before[name])


def test_an_interruption_leaves_a_module_its_own_weights() -> None:
    class Interrupted(dict[str, Any]):
        def __setitem__(self, name: str, value: Any) -> None:
            super().__setitem__(name, value)
            if name == "bias" and not isinstance(value, nn.Parameter):
                raise KeyboardInterrupt

    module = nn.Linear(3, 2)
    module._parameters = Interrupted(module._parameters)
    with pytest.raises(KeyboardInterrupt):
        stream(module, lambda c: torch.ones(2, 3), [0])
    assert all(isinstance(p, nn.Parameter) for p in module._parameters.values())


def test_a_generator_of_cuda_is_asked_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", (stand_in,))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    module = Jittered(lambda: torch.rand((), generator=stand_in).item())
    with pytest.raises(ConfigError, match="global random state"):
        stream(module, lambda c: torch.ones(2, 3), [0, 1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    stream(module, lambda c: torch.ones(2, 3), [0, 1])


def test_another_thread_may_draw_at_any_time() -> None:
    draws = iter([random.random])  # during the first run only
    module = Jittered(lambda: next(draws, lambda: 0)() and 1)
    stream(module, lambda c: torch.ones(2, 3), [0, 1])


def test_refuses_pixels_that_require_grad() -> None:
    frozen, known = nn.Linear(3, 2).requires_grad_(False), nn.Linear(3, 2)
    stream(known, lambda c: torch.ones(2, 3), [0])
    for module in (nn.Linear(3, 2), frozen, known):
        with pytest.raises(ConfigError, match="pixels get no gradient"):
            stream(module, lambda c: torch.ones(2, 3, requires_grad=True), [0])
    pixels = torch.ones(2, 3, requires_grad=True)
    stream(frozen, lambda c: pixels, [0], streaming=Streaming(budget_gib=None)).sum().backward()
    assert pixels.grad is not None
    with torch.no_grad():
        stream(known, lambda c: pixels, [0])


def test_refuses_cached_parametrizations() -> None:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    with nn.utils.parametrize.cached():
        with pytest.raises(ConfigError, match=r"parametrize\.cached"):
            stream(module, lambda c: torch.ones(2, 3), [0])
        stream(nn.Linear(3, 2), lambda c: torch.ones(2, 3), [0])
    stream(module, lambda c: torch.ones(2, 3), [0]).sum().backward()


def test_wrong_use() -> None:
    linear = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match="at least one chunk"):
        stream(linear, lambda c: torch.ones(2, 3), [])
    with pytest.raises(ConfigError, match="'cat' or 'sum'"):
        stream(linear, lambda c: torch.ones(2, 3), [0], reduce="mean")
    with pytest.raises(ConfigError, match="5 rows"):
        stream(
            Small().eval(), lambda c: torch.ones(2, 3, 8, 8), [0], sliced=(torch.ones(5, 5),), shared=(torch.ones(5),)
        )
    with pytest.raises(ConfigError, match="leading dimensions"):
        stream(linear, lambda c: (torch.ones(2, 3), torch.ones(3, 3)), [0])


@pytest.mark.parametrize(
    ("output", "reduce"),
    [
        (lambda x: x.mean(0, keepdim=True), "cat"),  # a row a chunk
        (lambda x: x.double() if len(x) > 1 else x, "cat"),
        (lambda x: x if len(x) > 1 else x[:, :1], "cat"),
        (lambda x: x[:, 0], "sum"),
    ],
    ids=["rows", "dtype", "width", "sum"],
)
@pytest.mark.parametrize("grad", [True, False])
def test_outputs_that_do_not_fit_together_are_refused(output: Any, reduce: Any, grad: bool) -> None:
    class Unlike(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = output(super().forward(x))
            return found

    with torch.set_grad_enabled(grad), pytest.raises(ConfigError, match="a chunk's output is"):
        stream(Unlike(3, 2), lambda count: torch.ones(count, 3), [1, 4], reduce=reduce)


def test_outputs_that_are_no_tensors_are_refused() -> None:
    class Named(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"out": super().forward(x)}

    with pytest.raises(ConfigError, match="returned dict"):
        stream(Named(3, 2), lambda c: torch.ones(2, 3), [0, 1])


def test_loaded_rows_are_counted() -> None:
    class Chunk:
        region_ids = (0,)

    with pytest.raises(ConfigError, match="1 for 2 rows"):
        stream(nn.Linear(3, 2), lambda c: torch.ones(2, 3), [Chunk(), Chunk()])
    with pytest.raises(ConfigError, match="and one row"):
        stream(nn.Linear(3, 2), lambda count: torch.ones(count, 3), [0, 2])


@pytest.mark.parametrize("count", [1, 4])
def test_errors_of_load_name_the_chunk(count: int) -> None:
    def load(chunk: int) -> Tensor:
        if chunk == count - 1:
            raise ValueError("broken")
        return torch.zeros(1, 2)

    with pytest.raises(ValueError, match="broken") as caught:
        stream(nn.Linear(2, 2), load, range(count))
    assert caught.value.__notes__ == [f"in {count - 1}"]


def test_errors_name_the_chunk_and_close_the_readers() -> None:
    class Named:
        def __init__(self, i: int) -> None:
            self.i = i

        def __str__(self) -> str:
            return f"scene.tif, region {self.i}"

    class Fails(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if x[0, 0] == 2:
                raise ValueError("boom")
            return super().forward(x)

    with pytest.raises(ValueError, match="boom") as caught:
        stream(Fails(3, 2), lambda c: torch.full((1, 3), float(c.i)), [Named(i) for i in range(6)])
    assert "scene.tif, region 2" in " ".join(caught.value.__notes__)
    assert not [t for t in threading.enumerate() if t.name.startswith("gigaxt-read")]


@pytest.mark.parametrize("streaming", BUDGETS)
@pytest.mark.parametrize("chunks", CHUNKS)
def test_chunks_without_a_graph_may_run_as_one(
    chunks: str, streaming: Streaming, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(CHUNKS[chunks], streaming)
    monkeypatch.setattr(gigaxt.streaming.single, "WITHOUT_GRAPH", {"cpu": 2})
    assert_same(run(CHUNKS[chunks], streaming), expected)


@pytest.mark.parametrize("training", [False, True])
def test_how_many_rows_run_as_one_without_a_graph(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of unlike form they stay apart: the fourth chunk has something that the others have not."""

    class Sum(nn.Linear):
        def forward(self, loaded: dict[str, Tensor]) -> Tensor:
            rows.append(len(loaded["x"]))
            return super().forward(loaded["x"]) + loaded.get("more", torch.zeros(()))

    def load(chunk: slice) -> dict[str, Tensor]:
        x = torch.arange(10.0)[chunk, None].expand(-1, 3)
        return {"x": x, "more": torch.ones(len(x), 2)} if chunk.start == 6 else {"x": x}

    rows: list[int] = []
    monkeypatch.setattr(gigaxt.streaming.single, "WITHOUT_GRAPH", {"cpu": 3})
    module = Sum(3, 2).requires_grad_(training)
    chunks = [slice(i, i + 2) for i in range(0, 10, 2)]
    out = stream(module, load, chunks)
    assert rows == ([2, 4, 2, 2] if training else [6, 2, 2])
    torch.testing.assert_close(out, torch.cat([module(load(chunk)) for chunk in chunks]))


def test_out_of_memory_is_retried_in_smaller_parts() -> None:
    class Tight(nn.Linear):
        most = 0

        def forward(self, x: Tensor) -> Tensor:
            self.most = max(self.most, len(x))
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    torch.manual_seed(0)
    pixels, module = torch.randn(7, 3), Tight(3, 2)
    out = stream(module, lambda c: pixels[c], [slice(0, 7)])
    torch.testing.assert_close(out, pixels @ module.weight.T + module.bias)
    out.sum().backward()
    torch.testing.assert_close(module.weight.grad, pixels.sum(0).expand(2, 3))
    assert module.most == 7


def test_parts_of_the_first_chunk_are_not_kept_where_memory_is_short() -> None:
    """The graph of the whole chunk holds 16 MiB and more."""
    torch.manual_seed(0)
    layers = [layer for _ in range(10) for layer in (nn.Linear(50, 50), nn.Tanh())]
    module, pixels, streaming = nn.Sequential(*layers).double(), torch.randn(4096, 50, dtype=torch.float64), Streaming()
    module(pixels).sum().backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    with ScarceMemory(10 << 20):
        stream(module, lambda c: pixels[c], [slice(0, 4096)], streaming=streaming).sum().backward()
    assert streaming.most_regions in (1024, 2048)
    assert_same([p.grad for p in module.parameters()], expected)


def test_no_graph_that_is_not_kept_stands_beside_the_next_chunks() -> None:
    """That of the first chunk is made to be looked at; each holds 1 MiB."""
    held: list[int] = []

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(1, 1 << 18), nn.Linear(1 << 18, 1)

        def forward(self, x: Tensor) -> Tensor:
            held.append(memory.now)
            y: Tensor = self.out(self.into(x).tanh())
            return y

    module = Wide()
    with LiveMemory(module.parameters()) as memory:
        stream(module, lambda chunk: torch.ones(1, 1), range(4)).sum().backward()
    assert len(held) == 8
    assert max(held[:4]) < 1 << 16
    gradients = sum(p.nbytes for p in module.parameters())
    assert max(held) < gradients + (1 << 16)


def test_what_fitted_is_noted_so_that_the_next_stream_does_not_fail_again() -> None:
    class Tight(nn.Linear):
        failed = 0

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2:
                self.failed += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    streaming, module = Streaming(), Tight(3, 2)
    for failed in (2, 2):  # 7, then 3 rows at once; after that 1
        stream(module, lambda c: torch.ones(7, 3), [0], streaming=streaming).sum().backward()
        assert module.failed == failed
        assert streaming.most_regions == 1


def test_a_large_sum_in_bfloat16_does_not_lose_itself() -> None:
    """Adding 1 to 256 in bfloat16 changes nothing; the sums over chunks are float32."""
    module = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    out = stream(module, lambda c: torch.ones(1, 1, dtype=torch.bfloat16), range(1000))
    out.sum().backward()
    assert module.weight.grad is not None
    assert abs(module.weight.grad.item() - 1000) < 4


def test_chunks_are_read_ahead_and_memory_is_bounded() -> None:
    alive: list[int] = []
    most = 0
    lock = threading.Lock()

    def load(i: int) -> Tensor:
        nonlocal most
        with lock:
            alive.append(i)
            most = max(most, len(alive))
        return torch.ones(1, 3)

    class Forgetting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with lock:
                alive.pop()
            return super().forward(x)

    with torch.no_grad():
        stream(Forgetting(3, 2), load, range(50))
    assert 1 <= most <= 4
