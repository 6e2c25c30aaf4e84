"""The promises of context encoders, in the order in which they are checked. See `check_context`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gigaxt.errors import ConfigError, DataError
from gigaxt.testing.subject import (
    Subject,
    described,
    difference,
    drawn,
    expect,
    expect_equal,
    expect_raises,
    expect_same,
    gradient_of,
    in_strips,
    lattice,
    ragged,
    run,
    run_in_two_orders,
    scattered,
    weights_of,
)

KEEP: Mapping[str, Any] = {"keep_tokens": 10**6}
RECOMPUTE: Mapping[str, Any] = {"keep_tokens": 0, "segment": 60}
MODES = (KEEP, RECOMPUTE)
"""Settings with which activations are kept, and with which they are computed again, 60 tokens of all rows at once."""
HEARD = 1e-6
"""Least relative change at the far corner."""
SIDE = 32
"""Of the lattice across which the far corner must hear."""

Check = Callable[[Subject], None]


class Promise(NamedTuple):
    """One thing that every encoder does."""

    text: str
    """Completes "the promise that ..."."""
    good_for: str
    """Who builds on it."""
    check: Check
    """Raises `Broken` where it does not hold."""


PROMISES: list[Promise] = []
"""First those without which others could not hold, so that what is named is the cause and not a consequence."""


def promise(text: str, good_for: str) -> Callable[[Check], Check]:
    """Enter the decorated function in `PROMISES`."""

    def enter(check: Check) -> Check:
        PROMISES.append(Promise(text, good_for, check))
        return check

    return enter


# ------------------------------------------------------------------------------------------------ what goes in and out


@promise(
    "outputs look like the tokens given, and arguments are left as they were",
    "heads take what comes out for what went in, and the tokens are needed again in the backward pass",
)
def _look_alike(subject: Subject) -> None:
    for dtype in (torch.float64, torch.float32):
        encoder = subject.encoder().to(dtype)
        coords = lattice(7, 11).float().expand(2, -1, -1)  # float32 and a view, as models give them
        given = (subject.tokens(2, 77).to(dtype), coords, torch.ones(2, 77, dtype=torch.bool))
        copies = [t.clone() for t in given]
        found = encoder(*given)
        expect(isinstance(found, tuple) and len(found) == 2, f"it returned {type(found).__name__}, not (tokens, state)")
        output, state = found
        alike = isinstance(output, Tensor) and (output.shape, output.dtype) == (given[0].shape, dtype)
        expect(alike, f"{described(given[0])} came out as {described(output)}")
        for name, before, after in zip(("tokens", "coords", "validity"), copies, given, strict=True):
            expect(torch.equal(before, after), f"`{name}` was changed in place")
        returned = "no state" if state is None else "a state"
        expect((state is not None) == encoder.causal, f"`causal` is {encoder.causal}, but {returned} was returned")


@promise(
    "the same call gives the same bits",
    "activations are computed again in the backward pass, and a stopped run continues to the same numbers",
)
def _same_bits(subject: Subject) -> None:
    encoder, tokens, coords = subject.encoder(RECOMPUTE), subject.tokens(1, 77), lattice(7, 11)
    random_state = torch.get_rng_state()
    first, second = (run(encoder, tokens, coords) for _ in range(2))
    expect(torch.equal(random_state, torch.get_rng_state()), "it draws from PyTorch's global random generator")
    for name, a, b in (
        ("outputs", first.output, second.output),
        ("token gradients", first.token_grad, second.token_grad),
    ):
        expect(torch.equal(a, b), f"{name} of two calls differ by up to {difference(a, b):.2g} of the largest value")


@promise(
    "float64 stays float64",
    "exactness is shown in float64, where a wrong gradient cannot hide behind rounding: promote, never call float()",
)
def _double(subject: Subject) -> None:
    encoder, tokens, coords = subject.encoder(), subject.tokens(1, 77), lattice(7, 11)
    step = 1e-7 * subject.tokens(1, 77, seed=2)
    with torch.no_grad():
        before, here, after = (encoder(t, coords)[0] for t in (tokens - step, tokens, tokens + step))
    # Of a smooth function the curvature is left, about 1e-13; of float32 the rounding, about 1e-7.
    expect_equal(before + after, 2 * here, "outputs 1e-7 ahead and behind, and twice those between,", 1e-11)


@promise(
    "the order in which tokens are given does not matter",
    "regions are encoded in chunks and in any order: where a token lies is told by its coordinates alone",
)
def _any_order(subject: Subject) -> None:
    run_in_two_orders(subject, lattice(7, 11))


@promise(
    "coordinates may be fractional, have gaps and start anywhere",
    "tokens of overviews lie between those of full size, empty regions are left out, and strips start far down",
)
def _any_place(subject: Subject) -> None:
    coords = torch.cat((scattered(), scattered() + 700), dim=1)
    found = run_in_two_orders(subject, coords)
    lost = int(found.token_grad.eq(0).all(-1).sum())
    expect(lost == 0, f"{lost} of {coords.shape[1]} tokens have no influence on any output")


@promise("one token alone gets an answer", "the smallest scene is one token, and so may be the rest of a strip")
def _alone(subject: Subject) -> None:
    for mode in MODES:
        found = run(subject.encoder(mode), subject.tokens(1, 1), torch.tensor([[[3.0, 5.0]]], dtype=torch.float64))
        expect(found.output.isfinite().all(), "its output is not finite")
        expect(found.token_grad.isfinite().all(), "its gradient is not finite")


@promise(
    "computing activations again changes nothing",
    "whether a scene's activations fit into `keep_tokens` must not be seen in the result",
)
def _recomputed(subject: Subject) -> None:
    # 30 tokens of each batch row at once; the same, a part of them kept; and a single one at once.
    for rows, cols, segment, budget_gib in ((7, 11, 60, 0.0), (7, 11, 60, 2e-4), (3, 5, 2, 0.0)):
        tokens, coords = subject.tokens(2, rows * cols), lattice(rows, cols).expand(2, -1, -1)
        settings = {"keep_tokens": 0, "segment": segment, "budget_gib": budget_gib}
        kept = run(subject.encoder(KEEP), tokens, coords)
        what = ", ".join(f"{name}={value}" for name, value in settings.items())
        expect_same(run(subject.encoder(settings), tokens, coords), kept, f"with {what} and with all kept")


# ------------------------------------------------------------------------------------------------ batches and masks


@promise(
    "masked tokens change nothing",
    "padding and pixels without data must not leak into the answer, whatever values they hold",
)
def _masked(subject: Subject) -> None:
    tokens, coords, validity = subject.tokens(3, 77), scattered().repeat(3, 1, 1), ragged()
    for mode in MODES:
        encoder = subject.encoder(mode)
        found = run(encoder, tokens, coords, validity)
        largest = found.output[~validity].abs().max()
        expect(largest == 0, f"masked tokens come out as up to {largest:.2g}, not as zeros")
        largest = found.token_grad[~validity].abs().max()
        expect(largest == 0, f"masked tokens get a gradient of up to {largest:.2g}")
        masked = ~validity.unsqueeze(-1)
        nan = run(encoder, tokens.masked_fill(masked, torch.nan), coords.masked_fill(masked, torch.nan), validity)
        expect_same(nan, found, "with NaN and with numbers in masked tokens")


@promise("rows of a batch do not hear of each other", "scenes of different shapes are computed as one batch")
def _rows(subject: Subject) -> None:
    tokens, coords, validity = subject.tokens(3, 77), scattered().repeat(3, 1, 1), ragged()
    for mode in MODES:
        encoder = subject.encoder(mode)
        together = run(encoder, tokens, coords, validity)
        totals: dict[str, Tensor] = {}
        for b, inside in enumerate(validity):
            weights = weights_of(tokens)[b : b + 1, inside]
            alone = run(encoder, tokens[b : b + 1, inside], coords[b : b + 1, inside], weights=weights)
            what = f"of a row with {int(inside.sum())} valid tokens, in a batch and alone,"
            expect_equal(together.output[b, inside], alone.output[0], f"outputs {what}")
            expect_equal(together.token_grad[b, inside], alone.token_grad[0], f"token gradients {what}")
            for name, grad in alone.parameter_grads.items():
                totals[name] = totals.get(name, 0) + grad
        for name, grad in totals.items():
            expect_equal(together.parameter_grads[name], grad, f"gradients of `{name}` of a batch and of its rows")
    plain = run(subject.encoder(), tokens, coords)
    expect_same(run(subject.encoder(), tokens, coords, torch.ones_like(validity)), plain, "with and without a mask")


# ------------------------------------------------------------------------------------------------ gradients


@promise("no_grad changes no output", "what is evaluated while training is what is predicted later")
def _no_grad(subject: Subject) -> None:
    tokens, coords = subject.tokens(1, 77), lattice(7, 11)
    for mode in MODES:
        encoder = subject.encoder(mode)
        with torch.no_grad():
            output, _ = encoder(tokens, coords)
        expect(not output.requires_grad, "an output under no_grad has a graph")
        expect_equal(output, run(encoder, tokens, coords).output, "outputs with and without no_grad")


@promise("gradients are the derivatives of the outputs", "training follows them")
def _derivatives(subject: Subject) -> None:
    # Two tokens: across more of them a memory may stop the gradient, as Transformer-XL's does by design.
    tokens, coords, step = subject.tokens(1, 2), lattice(1, 2), 1e-5
    for mode in MODES:
        encoder = subject.encoder(mode)
        found = run(encoder, tokens, coords)
        parameters = [encoder.get_parameter(name) for name in found.parameter_grads]
        for name, tensors, grads in (
            ("the tokens", [tokens], [found.token_grad]),
            ("the parameters", parameters, [*found.parameter_grads.values()]),
        ):
            directions = [drawn(t.shape, seed=7 + i) for i, t in enumerate(tensors)]
            losses = []
            with torch.no_grad():
                for sign in (1, -2, 1):  # to one side, to the other, and back
                    for tensor, direction in zip(tensors, directions, strict=True):
                        tensor.add_(direction, alpha=sign * step)
                    output, _ = encoder(tokens, coords)
                    losses.append((output * weights_of(output)).sum())
            measured = float(losses[0] - losses[1]) / (2 * step)
            said = sum(float((grad * direction).sum()) for grad, direction in zip(grads, directions, strict=True))
            error = abs(said - measured) / (1 + abs(measured))
            expect(error < 1e-6, f"that of {name} is off by {error:.2g} from a difference of outputs, allowed 1e-06")


@promise(
    "every parameter gets a gradient, once",
    "DistributedDataParallel waits for each and takes it when it comes; a parameter without one is not learnt",
)
def _every_parameter(subject: Subject) -> None:
    tokens, coords = subject.tokens(1, 77), lattice(7, 11)
    for mode in MODES:
        encoder = subject.encoder(mode)
        trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
        if not trained:
            return
        expected = run(encoder, tokens, coords).parameter_grads
        got: list[Tensor] = []
        hooks = [p.register_post_accumulate_grad_hook(got.append) for p in trained.values()]
        encoder.zero_grad()
        output, _ = encoder(tokens, coords)  # tokens that want no gradient, as of a frozen region encoder
        expect(output.requires_grad, "none does where the tokens want none")
        (output * weights_of(output)).sum().backward()
        for hook in hooks:
            hook.remove()
        for name, parameter in trained.items():
            expect(name in expected and parameter.grad is not None, f"`{name}` gets none")
            times = sum(parameter is other for other in got)
            expect(times == 1, f"`{name}` gets {times}")
            assert parameter.grad is not None
            what = f"gradients of `{name}`, where the tokens want one and where not,"
            expect_equal(parameter.grad, expected[name], what)


@promise("frozen parameters let gradients through", "a frozen context still has to teach the region encoder below it")
def _frozen(subject: Subject) -> None:
    tokens, coords = subject.tokens(1, 77), lattice(7, 11)
    for mode in MODES:
        trained = run(subject.encoder(mode), tokens, coords)
        frozen = run(subject.encoder(mode).requires_grad_(False), tokens, coords)
        expect_equal(frozen.token_grad, trained.token_grad, "token gradients with frozen parameters and with trained")
        expect(not frozen.parameter_grads, f"frozen ones got a gradient: {', '.join(frozen.parameter_grads)}")


# ------------------------------------------------------------------------------------------------ who hears of whom


@promise(
    "the far corner hears of a change, and the gradient comes back",
    "any pixel can influence any other: that is what a context is for",
)
def _far_corner(subject: Subject) -> None:
    encoder = subject.encoder(fresh=True)
    if not encoder.config.summary or not subject.mixes():
        return
    coords = lattice(SIDE, SIDE)
    # What fresh region encoders give: tokens that are all alike but for a tenth.
    tokens = (subject.tokens(1, 1) + 0.1 * subject.tokens(1, SIDE**2, seed=2)).requires_grad_()
    output, _ = encoder(tokens, coords)
    corners = {"first": 0, "last": SIDE**2 - 1}
    for source, target in (("first", "last"),) if encoder.causal else (("first", "last"), ("last", "first")):
        a, b = corners[source], corners[target]
        changed = tokens.detach().clone()
        changed[:, a] += 0.1 * subject.tokens(1, 1, seed=3)[:, 0]
        with torch.no_grad():
            moved, _ = encoder(changed, coords)
            change = float((moved - output)[:, b].norm() / output[:, b].norm())
        grad = gradient_of(output, tokens, slice(b, b + 1))
        back = float(grad[:, a].norm() / grad[:, b].norm())
        where = f"from the {source} to the {target} token of {SIDE} x {SIDE}"
        expect(change > HEARD, f"{where} a change arrives as {change:.2g}, expected more than {HEARD}")
        expect(back > HEARD, f"{where} the relative gradient is {back:.2g}, expected more than {HEARD}")


@promise("where `causal`, no token hears of later ones", "only then can a scene be continued strip by strip")
def _causal(subject: Subject) -> None:
    if not subject.encoder().causal:
        return
    for mode in MODES:
        tokens = subject.tokens(1, 77).requires_grad_()
        output, _ = subject.encoder({"order": "raster", **mode})(tokens, lattice(7, 11))
        for until in (1, 23, 70):
            grad = gradient_of(output, tokens, slice(until))
            leak = float(grad[:, until:].abs().max() / grad.abs().max())
            expect(leak == 0, f"the first {until} outputs get up to {leak:.2g} of their gradient from later tokens")


@promise(
    "where `causal`, a scene continued strip by strip equals one pass",
    "scenes that are too large for one pass, or that still arrive, are computed in strips",
)
def _continued(subject: Subject) -> None:
    if not subject.encoder().causal:
        return
    tokens, coords = subject.tokens(2, 60), lattice(12, 5).expand(2, -1, -1)
    validity = torch.ones(2, 60, dtype=torch.bool)
    validity[1, 3:11] = validity[1, 40:] = False
    validity[1, 57] = True  # each strip needs one
    for mode in MODES:
        encoder = subject.encoder({"order": "raster", **mode})
        whole = run(encoder, tokens, coords, validity)
        for heights in ((1, 4, 7), (6, 1, 1, 4)):
            strips = run(encoder, tokens, coords, validity, forward=partial(in_strips, [5 * h for h in heights]))
            expect_same(strips, whole, f"of strips of {', '.join(map(str, heights))} rows and of one pass")


@promise("a state is refused where nothing is causal", "continuing would silently give something else than one pass")
def _state_refused(subject: Subject) -> None:
    encoder = subject.encoder()
    if encoder.causal:
        return
    state = ((torch.zeros(1, dtype=torch.float64),),)
    expect_raises(ConfigError, lambda: encoder(subject.tokens(1, 6), lattice(2, 3), None, state), "a state")


# ------------------------------------------------------------------------------------------------ use


@promise("float32 and bfloat16 give finite numbers, and float32 is as float64", "models are trained in them")
def _precisions(subject: Subject) -> None:
    tokens, coords = subject.tokens(1, 77), lattice(7, 11)
    exact = run(subject.encoder(), tokens, coords)
    for mode in MODES:
        for autocast in (False, True):
            name = "bfloat16 autocast" if autocast else "float32"
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found = run(subject.encoder(mode).float(), tokens.float(), coords.float())
            expect(found.output.dtype == torch.float32, f"with {name}, float32 tokens come out as {found.output.dtype}")
            grads = {f"gradients of `{key}`": grad for key, grad in found.parameter_grads.items()}
            for what, value in {"outputs": found.output, "token gradients": found.token_grad, **grads}.items():
                expect(value.isfinite().all(), f"with {name}, {what} are not finite")
            if not autocast:
                expect_equal(found.output.double(), exact.output, "outputs in float32 and in float64", 1e-3)


@promise("a saved and loaded encoder gives the same answer", "what was trained is what is used, and so are averages")
def _saved(subject: Subject) -> None:
    encoder, tokens, coords = subject.encoder(), subject.tokens(1, 77), lattice(7, 11)
    with torch.no_grad():
        expected, _ = encoder(tokens, coords)
        loaded = subject.encoder(seed=1)
        loaded.load_state_dict(encoder.state_dict())
        expect_equal(loaded(tokens, coords)[0], expected, "outputs before saving and after loading", 1e-12)
        expect_equal(copy.deepcopy(encoder)(tokens, coords)[0], expected, "outputs of a copy and its original", 1e-12)


@promise("input that has no answer raises DataError", "a wrong answer is worse than none")
def _bad_input(subject: Subject) -> None:
    encoder, tokens, coords = subject.encoder(), subject.tokens(2, 6), lattice(2, 3).expand(2, -1, -1)
    expect_raises(DataError, lambda: encoder(tokens[:, :0], coords[:, :0]), "no token at all")
    validity = torch.tensor([[True] * 6, [False] * 6])
    expect_raises(DataError, lambda: encoder(tokens, coords, validity), "a row that is masked as a whole")
    for value in (torch.nan, torch.inf, -1.0):
        wrong = coords.clone()
        wrong[1, 2, 0] = value
        expect_raises(DataError, partial(encoder, tokens, wrong), f"a coordinate of {value}")
