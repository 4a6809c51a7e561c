"""One of every position scheme, with settings that make short documents stretch."""

from lit_longctx.position import (
    DynamicNTK,
    Llama3,
    LongRoPE,
    NTKAware,
    PartialRoPE,
    PositionInterpolation,
    PositionScheme,
    ProportionalRoPE,
    RoPE,
    TransformerXL,
    XPos,
    YaRN,
)


def every_scheme(head_dim: int) -> list[PositionScheme]:
    """All eleven, for heads of this width."""
    pairs = head_dim // 2
    lists = {"short_factor": [1.0] * pairs, "long_factor": [1.5 + i for i in range(pairs)]}
    return [
        RoPE(),
        PositionInterpolation(factor=4),
        NTKAware(factor=4),
        DynamicNTK(factor=2, original_context=10),
        YaRN(factor=4, original_context=64),
        Llama3(factor=4, original_context=64),
        LongRoPE(factor=4, original_context=10, unscaled_tokens=2, **lists),
        PartialRoPE(partial_rotary_factor=0.5),
        ProportionalRoPE(partial_rotary_factor=0.5),
        XPos(),
        TransformerXL(distance_dim=8),
    ]
