"""Context encoders: the tokens of a whole scene in, their context out, one token for each."""

from gigaxt.nn.context.base import (
    ContextConfig,
    ContextEncoder,
    ContextState,
    NoContext,
    build_context,
    register_context,
)
from gigaxt.nn.context.full import Full
from gigaxt.nn.context.hyper import HyperAttention, HyperOptions
from gigaxt.nn.context.layered import LayeredContext, Mixer
from gigaxt.nn.context.longformer import Longformer, LongformerOptions
from gigaxt.nn.context.mamba import Mamba, MambaOptions
from gigaxt.nn.context.mamba2 import Mamba2, Mamba2Options
from gigaxt.nn.context.window import Window, WindowOptions
from gigaxt.nn.context.xl import TransformerXL, TransformerXLOptions

register_context("full", Full)
register_context("hyper", HyperAttention)
register_context("longformer", Longformer)
register_context("mamba", Mamba)
register_context("mamba2", Mamba2)
register_context("window", Window)
register_context("xl", TransformerXL)

__all__ = [
    "ContextConfig",
    "ContextEncoder",
    "ContextState",
    "Full",
    "HyperAttention",
    "HyperOptions",
    "LayeredContext",
    "Longformer",
    "LongformerOptions",
    "Mamba",
    "Mamba2",
    "Mamba2Options",
    "MambaOptions",
    "Mixer",
    "NoContext",
    "TransformerXL",
    "TransformerXLOptions",
    "Window",
    "WindowOptions",
    "build_context",
    "register_context",
]
