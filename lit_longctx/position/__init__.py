"""Position schemes: how a token's position reaches attention."""

from lit_longctx.position.longrope import LongRoPE
from lit_longctx.position.nope import NoPE
from lit_longctx.position.partial import PartialRoPE, ProportionalRoPE
from lit_longctx.position.rotary import (
    DynamicNTK,
    Llama3,
    NTKAware,
    PositionInterpolation,
    RoPE,
    Rotary,
)
from lit_longctx.position.scheme import PositionScheme
from lit_longctx.position.temperature import QueryTemperature
from lit_longctx.position.transformer_xl import TransformerXL
from lit_longctx.position.xpos import XPos
from lit_longctx.position.yarn import YaRN

__all__ = [
    "DynamicNTK",
    "Llama3",
    "LongRoPE",
    "NTKAware",
    "NoPE",
    "PartialRoPE",
    "PositionInterpolation",
    "PositionScheme",
    "ProportionalRoPE",
    "QueryTemperature",
    "RoPE",
    "Rotary",
    "TransformerXL",
    "XPos",
    "YaRN",
]
