"""A from-scratch Llama: attention back ends, layer kinds, sources of keys and values, LM head."""

from lit_longctx.model.config import LlamaConfig
from lit_longctx.model.llama import (
    MLP,
    Attention,
    Llama,
    chosen_device,
    initial_weight,
    layers_of,
)

__all__ = [
    "MLP",
    "Attention",
    "Llama",
    "LlamaConfig",
    "chosen_device",
    "initial_weight",
    "layers_of",
]
