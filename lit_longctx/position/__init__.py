"""Position schemes: how a token's place reaches attention."""

from lit_longctx.position.rotary import RoPE
from lit_longctx.position.scheme import PositionScheme
from lit_longctx.position.transformer_xl import TransformerXL

__all__ = ["PositionScheme", "RoPE", "TransformerXL"]
