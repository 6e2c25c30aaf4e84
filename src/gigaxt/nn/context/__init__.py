"""Context encoders: tokens of a whole scene in, the same tokens told of each other out."""

from gigaxt.nn.context.base import (
    ContextConfig,
    ContextEncoder,
    ContextState,
    NoContext,
    build_context,
    register_context,
)
from gigaxt.nn.context.full import Full
from gigaxt.nn.context.layered import LayeredContext, Mixer
from gigaxt.nn.context.mamba2 import Mamba2, Mamba2Options

register_context("full", Full)
register_context("mamba2", Mamba2)

__all__ = [
    "ContextConfig",
    "ContextEncoder",
    "ContextState",
    "Full",
    "LayeredContext",
    "Mamba2",
    "Mamba2Options",
    "Mixer",
    "NoContext",
    "build_context",
    "register_context",
]
