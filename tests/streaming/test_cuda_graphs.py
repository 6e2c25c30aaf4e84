"""Chunks as CUDA graphs, on a CPU: a stand-in for the graph shows what is recorded, replayed and let go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import gigaxt
from gigaxt.streaming import cuda_graphs, keyed, known
from gigaxt.streaming.keyed import key_dropout
from gigaxt.streaming.single import stream


class Again:
    """As a CUDA graph has it: inputs and outputs at fixed places, of which a replay reads and writes the contents."""

    made: ClassVar[list[Again]] = []

    def __init__(self, work: Any, inputs: Any, beside: Again | None = None) -> None:
        leaves, self.tree = tree_flatten(inputs)
        self.inputs = [cuda_graphs._place_for(t) if isinstance(t, Tensor) else t for t in leaves]
        self.work, self.beside, self.outputs, self.replays = work, beside, None, 0
        self.rows = len(leaves[0])
        Again.made.append(self)

    def replay(self, inputs: Any) -> Any:
        for own, leaf in zip(self.inputs, tree_flatten(inputs)[0], strict=True):
            if isinstance(own, Tensor):
                own.copy_(leaf)
        token = keyed._active.set(None)  # a graph does not know for which rows dropout is keyed now
        found = [None if t is None else t.detach() for t in self.work(tree_unflatten(self.inputs, self.tree))]
        keyed._active.reset(token)
        if self.outputs is None:
            self.outputs = [None if t is None else t.clone() for t in found]
        for own, new in zip(self.outputs, found, strict=True):
            if own is not None:
                own.copy_(new)
        self.replays += 1
        return self.outputs


@pytest.fixture(autouse=True)
def recorded_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(known, "RECORDED_ON", ("cpu",))
    monkeypatch.setattr(cuda_graphs, "Recording", Again)
    Again.made = []
    yield
    known._known.clear()


class Net(nn.Module):
    """Rows and their slices to two outputs; stochastic depth and dropout included."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)
        self.drop, self.factor, self.scale = nn.Dropout(0.4), 1.0, torch.ones(3).double()
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, loaded: dict[str, Tensor], added: Tensor) -> tuple[Tensor, Tensor]:
        x = self.drop(self.first(loaded["x"]).tanh())
        return self.second(x) * self.frozen * self.factor * self.scale, x.sum(1) + added


PIXELS = torch.randn(11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def net() -> Net:
    torch.manual_seed(1)
    return key_dropout(Net().double().train())


class Around(nn.Module):
    """As models make them for every step."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, loaded: dict[str, Tensor], added: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.net(loaded, added)
        return found


def step(
    module: Net, *, graphs: bool, rows: int = 11, seed: int = 4, most_regions: int | None = None, **streaming: Any
) -> list[Tensor]:
    """Outputs and gradients; in chunks of 3, the last of 2."""
    module.zero_grad()
    added = torch.arange(float(rows), dtype=torch.float64, requires_grad=True)
    chunks = [slice(i, min(i + 3, rows)) for i in range(0, rows, 3)]
    settings = gigaxt.Streaming(cuda_graphs=graphs, **streaming)
    settings.most_regions = most_regions
    pixels = PIXELS.repeat(-(-rows // 11), 1)
    a, b = stream(Around(module), lambda c: {"x": pixels[c]}, chunks, sliced=[added], seed=seed, streaming=settings)
    (a.square().sum() + (a.mean() * b).square().sum()).backward()
    grads = [p.grad for p in module.parameters() if p.requires_grad]
    return [t.detach().clone() for t in (a, b, added.grad, *grads) if t is not None]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_steps_equal_those_without_graphs() -> None:
    """Also where weights changed in between, and other rows, slices, gradients and dropout came."""
    recorded, plain = net(), net()
    for seed in range(4):
        assert_equal(step(recorded, graphs=True, seed=seed), step(plain, graphs=False, seed=seed))
        with torch.no_grad():
            for module in (recorded, plain):
                for p in module.parameters():
                    p.mul_(1.1)
    # Whole chunks in the first step, in which one was looked at and one was run; the last part in the second.
    assert [(one.rows, one.replays) for one in Again.made] == [(3, 1 + 3 * 3), (3, 2 + 3 * 3), (2, 3), (2, 3)]
    assert [one.beside for one in Again.made] == [None, *Again.made[:1] * 3]  # in the same memory


@pytest.mark.parametrize("way", [{"budget_gib": 1e-6}, {"budget_gib": 1.0}], ids=["some kept", "all kept"])
def test_kept_chunks_are_not_recorded(way: dict[str, float]) -> None:
    recorded, plain = net(), net()
    for seed in range(3):
        assert_equal(step(recorded, graphs=True, seed=seed, **way), step(plain, graphs=False, seed=seed, **way))
    if way["budget_gib"] == 1.0:
        assert not Again.made


def test_sums_over_chunks() -> None:
    """Whose first summand a graph overwrites as well."""
    found = []
    for graphs in (True, False):
        module = net()
        for _ in range(2):
            module.zero_grad()
            chunks = [slice(i, i + 2) for i in range(0, 10, 2)]
            settings = gigaxt.Streaming(cuda_graphs=graphs)
            loss, _ = stream(
                Around(module), lambda c: {"x": PIXELS[c]}, chunks,
                sliced=[torch.zeros(10, dtype=torch.float64)], reduce="sum", seed=3, streaming=settings,
            )  # fmt: skip
            loss.square().sum().backward()
        found.append([loss.detach(), *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(Again.made) == 2
    assert_equal(*found)


def test_parts_of_a_chunk_do_not_overwrite_each_other() -> None:
    """As they come once the device has run out of memory."""
    recorded, plain = net(), net()
    for seed in range(3):
        found = step(recorded, graphs=True, rows=12, seed=seed, most_regions=1)
        assert_equal(found, step(plain, graphs=False, rows=12, seed=seed))


@pytest.mark.parametrize("change", ["evaluation", "a number", "a tensor", "a weight elsewhere", "frozen"])
def test_another_state_is_recorded_anew(change: str) -> None:
    recorded, plain = net(), net()
    for _ in range(2):
        step(recorded, graphs=True, rows=9)
    before = len(Again.made)
    for module in (recorded, plain):
        if change == "evaluation":
            module.drop.eval()
        elif change == "a number":
            module.factor = 3.0
        elif change == "a tensor":
            module.scale = module.scale * 2
        elif change == "a weight elsewhere":
            module.second = nn.Linear(8, 3).double()
            module.second.load_state_dict({"weight": torch.ones(3, 8), "bias": torch.ones(3)})
        else:
            module.second.requires_grad_(False)
    for _ in range(2):
        assert_equal(step(recorded, graphs=True, rows=9), step(plain, graphs=False, rows=9))
    assert len(Again.made) == before + 2


def test_hooks_keep_being_called() -> None:
    module, called = net(), []
    module.second.register_forward_hook(lambda *_: called.append(1))
    step(module, graphs=True)
    assert not Again.made
    assert len(called) == 2 * 4


def test_autocast_is_part_of_the_state() -> None:
    recorded, plain = net().float(), net().float()
    pixels = PIXELS.float()
    for enabled in (False, True, False):
        found = []
        for module, graphs in ((recorded, True), (plain, False)):
            module.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                a, _ = stream(
                    module, lambda c: {"x": pixels[c]}, [slice(i, i + 3) for i in (0, 3, 6)],
                    sliced=[torch.zeros(9)], seed=1, streaming=gigaxt.Streaming(cuda_graphs=graphs),
                )  # fmt: skip
            a.square().sum().backward()
            found.append([a.detach(), *(p.grad for p in module.parameters() if p.grad is not None)])
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y)


def test_graphs_of_many_chunks_go_with_their_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "KEPT_BELOW", 7)
    recorded, plain = net(), net()
    for rows, made in ((9, 2), (9, 2), (21, 2), (21, 4)):
        assert_equal(step(recorded, graphs=True, rows=rows), step(plain, graphs=False, rows=rows))
        assert len(Again.made) == made
    assert Again.made[-1].beside is None  # the other one is gone by then


def test_the_most_common_forms_are_recorded() -> None:
    """Two of them; another takes the place of one when it is twice as common."""
    recordings, sizes = cuda_graphs.Recordings(), [1, 1, 2, 3, 3, 2, 2, *[3] * 3, *[1] * 3, *[3] * 3]
    for size in sizes:
        x = torch.full((size,), float(size))
        (found,) = recordings.run("double", lambda inputs: [2 * inputs], x)
        assert torch.equal(found, 2 * x)
    # 1 at its second time, 3 at its second, 2 never (3 of it, 2 and 2 of the others), nor do two of five go for it.
    assert [one.rows for one in Again.made] == [1, 3]
    for _ in range(7):
        recordings.run("double", lambda inputs: [2 * inputs], torch.ones(2))
    assert [one.rows for one in Again.made] == [1, 3, 2]  # ten of it, five of the least common one
    assert sum(one.replays for one in Again.made[:2]) == 4 + 7


def test_what_cannot_be_recorded_is_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graphs, "Recording", refuse)
    recorded, plain = net(), net()
    for _ in range(3):
        assert_equal(step(recorded, graphs=True), step(plain, graphs=False))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].endswith("cannot be recorded, run as before: operation not permitted when stream is capturing")


def test_without_a_gpu_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "RECORDED_ON", ("cuda",))
    assert_equal(step(net(), graphs=True), step(net(), graphs=False))
    assert not Again.made
