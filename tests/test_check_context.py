"""Encoders that keep every promise pass; for each promise there is one that breaks it, and is caught for that."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

import gigaxt
from gigaxt.errors import ConfigError
from gigaxt.nn.context import ContextConfig, ContextEncoder, NoContext, base, register_context
from gigaxt.testing import check_context
from gigaxt.testing.promises import PROMISES
from lying_contexts import (
    Answers,
    BatchMean,
    Bfloat16Out,
    Coarse,
    Counting,
    CountsMasked,
    Deaf,
    Detaches,
    Dropping,
    Forgets,
    Found,
    FrozenBlocks,
    Halved,
    HearsMasked,
    Idle,
    InPlace,
    LeavesMasked,
    Mean,
    Neighbours,
    Numbered,
    OneWay,
    OnGrid,
    Overflows,
    Peeks,
    Reentrant,
    ReturnsNoState,
    RunningMean,
    Segmented,
    Shortened,
    Single,
    Skips,
    Spread,
    SpreadsNaN,
    TakesStates,
    TokensOnly,
    Twice,
    TwiceTheGradient,
    Uncopied,
    Unsaved,
    Wanders,
)

CAUSAL = {"bidirectional": False, "summary": 0}


def test_honest_encoders_pass() -> None:
    check_context(Mean)
    check_context(Mean, summary=0, dim=6, order="raster")
    check_context(RunningMean)
    check_context(RunningMean, **CAUSAL)


BITS, ROWS, CORNER = "the same call gives the same bits", "rows of a batch", "the far corner hears"
ALIKE, MASKED, ONCE = "outputs look like", "masked tokens change nothing", "every parameter gets a gradient, once"
STRIPS, FINITE, SAVED = "where `causal`, a scene continued", "float32 and bfloat16", "a saved and loaded encoder"
LIARS: list[tuple[type[ContextEncoder], str, str]] = [
    (Shortened, ALIKE, r"\(2, 77, 16\) of torch.float64 came out as \(2, 76, 16\)"),
    (Halved, ALIKE, r"\(2, 77, 16\) of torch.float64 came out as \(2, 77, 16\) of torch.float32"),
    (TokensOnly, ALIKE, r"it returned Tensor, not \(tokens, state\)"),
    (InPlace, ALIKE, "`tokens` was changed in place"),
    (ReturnsNoState, ALIKE, "`causal` is True, but no state was returned"),
    (Dropping, BITS, "it draws from PyTorch's global random generator"),
    (Counting, BITS, r"outputs of two calls differ by up to 0\.00\d+ of the largest value"),
    (Single, "float64 stays float64", r"differ by up to \d\.?\d*e-\d+ of the largest value, allowed 1e-11"),
    (Numbered, "the order in which tokens are given", r"outputs of .* in two orders differ by up to (0\.\d+|1) of"),
    (OnGrid, "coordinates may be fractional", "outputs of the same tokens in two orders differ"),
    (Spread, "one token alone gets an answer", "its output is not finite"),
    (Segmented, "computing activations again", "with keep_tokens=0, segment=60, budget_gib=0.0 and with all kept"),
    (LeavesMasked, MASKED, r"masked tokens come out as up to 0\.1, not as zeros"),
    (HearsMasked, MASKED, r"masked tokens get a gradient of up to 0\.\d+"),
    (SpreadsNaN, MASKED, "outputs with NaN and with numbers in masked tokens differ by up to nan"),
    (CountsMasked, ROWS, r"outputs of a row with \d+ valid tokens, in a batch and alone, differ by"),
    (BatchMean, ROWS, r"outputs of a row with \d+ valid tokens, in a batch and alone, differ by"),
    (TwiceTheGradient, "gradients are the derivatives", r"that of the tokens is off by \d"),
    (Idle, ONCE, "`idle` gets none"),
    (Reentrant, ONCE, "none does where the tokens want none"),
    (Twice, ONCE, "`mix.weight` gets 2"),
    (FrozenBlocks, "frozen parameters let gradients through", "token gradients .* differ by up to"),
    (Skips, "no_grad changes no output", "outputs with and without no_grad differ"),
    (Neighbours, CORNER, "from the first to the last token of 32 x 32 a change arrives as 0,"),
    (OneWay, CORNER, "from the last to the first token of 32 x 32 a change arrives as 0,"),
    (Deaf, CORNER, "from the first to the last token of 32 x 32 the relative gradient is 0,"),
    (Peeks, "where `causal`, no token hears", r"the first 1 outputs get up to 0\.\d+ of their gradient"),
    (Forgets, STRIPS, "outputs of strips of 1, 4, 7 rows and of one pass differ"),
    (Detaches, STRIPS, "token gradients of strips of 1, 4, 7 rows and of one pass differ"),
    (TakesStates, "a state is refused", "a state was accepted, expected ConfigError"),
    (Overflows, FINITE, "with float32, outputs are not finite"),
    (Coarse, FINITE, "outputs in float32 and in float64 differ by"),
    (Bfloat16Out, FINITE, "with bfloat16 autocast, float32 tokens come out as torch.bfloat16"),
    (Unsaved, SAVED, "outputs before saving and after loading differ"),
    (Uncopied, SAVED, "outputs of a copy and its original differ"),
    (Answers, "input that has no answer raises", "a row that is masked as a whole was accepted, expected DataError"),
    (Wanders, "input that has no answer raises", "a coordinate of nan was accepted, expected DataError"),
]


@pytest.mark.parametrize(("cls", "promise", "figures"), LIARS, ids=[cls.__name__ for cls, _, _ in LIARS])
def test_each_liar_is_caught(cls: type[ContextEncoder], promise: str, figures: str) -> None:
    settings = CAUSAL if issubclass(cls, RunningMean) else {}
    with pytest.raises(
        AssertionError, match=f"^{cls.__name__} breaks the promise that {promise}.*: .*{figures}"
    ) as found:
        check_context(cls, **settings)
    assert "\n" not in str(found.value)
    assert found.value.__notes__[0].startswith("What the promise is good for: ")


def test_each_promise_has_a_liar() -> None:
    assert all(any(promise.text.startswith(prefix) for _, prefix, _ in LIARS) for promise in PROMISES)


# ------------------------------------------------------------------------------------------------ the function itself


class Fails(Mean):
    def told(self, *arguments: Any) -> Found:
        raise ValueError("two\nlines")


def test_what_the_encoder_raises_is_the_cause() -> None:
    with pytest.raises(AssertionError, match="it raised ValueError: two lines") as found:
        check_context(Fails)
    assert isinstance(found.value.__cause__, ValueError)


@pytest.mark.parametrize("cls", [Mean, Fails])
def test_a_temporary_name_is_forgotten(cls: type[ContextEncoder]) -> None:
    known = dict(base.KINDS)
    with contextlib.suppress(AssertionError):
        check_context(cls)
    assert known == base.KINDS
    assert cls not in base.KINDS.values()


def test_a_registered_kind_keeps_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnlyAsMine(Mean):
        @classmethod
        def check_config(cls, config: ContextConfig) -> None:
            assert config.kind == "mine"

    monkeypatch.setattr(base, "KINDS", dict(base.KINDS))
    register_context("mine", OnlyAsMine)
    check_context(OnlyAsMine)
    assert base.KINDS["mine"] is OnlyAsMine


def test_settings_reach_the_config() -> None:
    with pytest.raises(ConfigError, match=r"context.options.window: unknown key"):
        check_context(Mean, options={"window": 7})
    with pytest.raises(ConfigError, match=r"context.depth: expected at least 1, got 0"):
        check_context(Mean, depth=0)
    with pytest.raises(ConfigError, match=r"expected a subclass of .*ContextEncoder, got <class .*Linear"):
        check_context(nn.Linear)


def test_a_baseline_is_excused_from_hearing() -> None:
    check_context(NoContext)


def test_random_numbers_of_the_caller_go_on_undisturbed() -> None:
    state = torch.get_rng_state()
    check_context(Mean)
    assert torch.equal(state, torch.get_rng_state())


def test_it_is_found_below_the_package() -> None:
    assert gigaxt.__getattr__("testing").check_context is check_context
