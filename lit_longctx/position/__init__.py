"""Position schemes: how a token's place reaches attention."""

from lit_longctx.position.rotary import (
    DynamicNTK,
    Llama3,
    LongRoPE,
    NTKAware,
    PositionInterpolation,
    RoPE,
    Rotary,
    XPos,
    YaRN,
)
from lit_longctx.position.scheme import PositionScheme
from lit_longctx.position.transformer_xl import TransformerXL

__all__ = [
    "DynamicNTK",
    "Llama3",
    "LongRoPE",
    "NTKAware",
    "PositionInterpolation",
    "PositionScheme",
    "RoPE",
    "Rotary",
    "TransformerXL",
    "XPos",
    "YaRN",
]
