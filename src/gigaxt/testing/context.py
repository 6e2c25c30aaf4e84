"""`check_context`: does a context encoder keep the promises that the rest of gigaxt builds on?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gigaxt.errors import ConfigError
from gigaxt.nn.context import ContextEncoder, base, register_context
from gigaxt.testing.promises import PROMISES
from gigaxt.testing.subject import Broken, Subject


def check_context(cls: type[ContextEncoder], **settings: Any) -> None:
    """Check that a context encoder keeps the contract, on small scenes, on the CPU, within seconds.

        from gigaxt.testing import check_context

        def test_my_context() -> None:
            check_context(MyContext)
            check_context(MyContext, bidirectional=False, summary=0)  # once for each way of working
            check_context(MyContext, dim=64, options={"window": 7})

    Everything is compared in float64, with parameters moved a little from their initial values, so that what starts at
    zero takes part. What is promised:

    - Outputs look like the tokens given (shape, dtype), and the arguments are left as they were. float64 stays float64.
    - The same call gives the same bits and draws no global random numbers.
    - The order in which tokens are given does not matter; coordinates may be fractional, and regions may be missing.
    - Masked tokens change nothing, whatever they hold, NaN included; they come out as zeros and get no gradient.
    - Rows of a batch do not hear of each other: outputs and gradients of ragged rows equal those of each row alone.
    - One token alone gets an answer.
    - Computing activations again (`keep_tokens=0`, `segment`, `budget_gib`) changes neither outputs nor gradients.
    - Gradients are derivatives. Every parameter gets one, once. Frozen parameters let gradients through.
      `no_grad` changes no output.
    - With `summary` the far corner hears of a change in the first one, and the gradient comes back, both ways (only
      forth where `causal`): by more than 1e-6 relative at the initial weights. An encoder in which no token hears of
      any other, like `none`, is a baseline and excused. Without `summary`, how far it reaches is its own matter.
    - Where `causal` (with `order="raster"`): no token hears of later ones, and a scene continued strip by strip, in
      unequal strips, gives the outputs and gradients of one pass. A state is refused elsewhere.
    - float32 is as float64 up to rounding; float32 and bfloat16 autocast give finite outputs and gradients.
    - A saved and loaded encoder, and a copy, give the same answer.
    - Zero tokens, a row that is masked as a whole, and coordinates that are negative or not finite raise DataError.

    Args:
        cls: built as `cls(ContextConfig(...))`. It need not be registered; if it is, `kind` is its name, else a
            temporary one that is forgotten afterwards.
        settings: fields of `ContextConfig`; `dim=16, depth=2, summary=4` where not given. Choose `options` so small
            that 77 tokens go through everything that the encoder does: several blocks, windows, chunks.

    Raises:
        AssertionError: names the broken promise and the figures; its note says what the promise is good for. Whatever
            the encoder itself raised is the cause.
        ConfigError: `cls` is no ContextEncoder, or refuses the settings.
    """
    if not (isinstance(cls, type) and issubclass(cls, ContextEncoder)):
        raise ConfigError(f"check_context: expected a subclass of gigaxt.nn.context.ContextEncoder, got {cls!r}")
    with _registered(cls) as kind:
        subject = Subject({"dim": 16, "depth": 2, "summary": 4, **settings, "kind": kind})
        subject.encoder()  # a ConfigError here is about the settings, not about a promise
        for promise in PROMISES:
            cause: Exception | None = None
            try:
                promise.check(subject)
                continue
            except Broken as broken:
                found = str(broken)
            except Exception as error:
                cause, found = error, f"it raised {type(error).__name__}: {' '.join(str(error).split())}"
            failure = AssertionError(f"{cls.__name__} breaks the promise that {promise.text}: {found}")
            failure.add_note(f"What the promise is good for: {promise.good_for}.")
            raise failure from cause


@contextmanager
def _registered(cls: type[ContextEncoder]) -> Iterator[str]:
    """The kind under which `cls` is known, or a name for the time of the block."""
    for kind, known in base.KINDS.items():
        if known is cls:
            yield kind
            return
    name = f"{cls.__module__}.{cls.__qualname__} (checked)"
    register_context(name, cls)
    try:
        yield name
    finally:
        del base.KINDS[name]
