"""Shape of a Llama, and what other families of models have that a Llama has not."""

from dataclasses import dataclass
from math import inf
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lit_longctx.position.scheme import THETA


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a model; fields up to eos_token_id are those of Hugging Face's config.json.

    With the defaults of the others it is a Llama.
    """

    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width inside the MLP."""
    num_hidden_layers: int
    """Number of blocks."""
    num_attention_heads: int
    """Query heads per block."""
    num_key_value_heads: int | None = None
    """Key and value heads per block (GQA); default: as many as query heads."""
    head_dim: int | None = None
    """Features per head; default: hidden_size / num_attention_heads."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square before the root."""
    tie_word_embeddings: bool = False
    """Whether the LM head is the embedding."""
    attention_bias: bool = False
    """Whether q, k, v and o projections have biases."""
    max_position_embeddings: int = 2048
    """Tokens per sequence the model was trained on."""
    bos_token_id: int | None = 1
    """Token that begins every document."""
    eos_token_id: int | None = 2
    """Token that ends every document."""
    model_type: str = "llama"
    """Hugging Face's name of the family that the model is of; decides what an export calls it."""
    o_proj_bias: bool | None = None
    """Whether the o projection has a bias; default: as attention_bias says."""
    qk_norm: Literal["none", "head", "width"] = "none"
    """RMSNorm of q and k before positions reach them: of each head by itself (Qwen 3, Gemma 3), or
    of all heads together (OLMo 2)."""
    norm_placement: Literal["before", "after", "both"] = "before"
    """What RMSNorm is applied to, of attention and MLP: their input (Llama), their output before it
    is added to the residual stream (OLMo 2), or both (Gemma 3)."""
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    """Activation of the MLP's gate."""
    scale_embeddings: bool = False
    """Whether embeddings are multiplied with √hidden_size (Gemma 3); the LM head never is."""
    query_pre_attn_scalar: int | None = None
    """Attention scores are divided by its root; default: head_dim."""

    def __post_init__(self) -> None:
        self._check_values()
        heads = self.num_attention_heads
        if self.o_proj_bias == self.attention_bias:
            object.__setattr__(self, "o_proj_bias", None)
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", heads)
        if self.head_dim is None:
            if self.hidden_size % heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is no multiple of num_attention_heads "
                    f"{heads}; give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        if heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {self.kv_heads}"
            )

    def _check_values(self) -> None:
        """ValueError, by name, for a value that no Llama can have."""
        for name, value in vars(self).items():
            if name.endswith("_token_id") or value is None:
                valid, expected = value is None or type(value) is int, "a whole number, or none"
            elif name == "model_type":
                valid, expected = isinstance(value, str), "a name"
            elif name in CHOICES:
                valid, expected = value in CHOICES[name], f"one of {', '.join(CHOICES[name])}"
            elif name in FLAGS:
                valid, expected = isinstance(value, bool), "true or false"
            elif name == "rms_norm_eps":
                valid = type(value) in (int, float) and 0 < value < inf
                expected = "a finite number above 0"
            else:
                valid, expected = type(value) is int and value > 0, "a whole number above 0"
            if not valid:
                raise ValueError(f"{name} is {value!r}; expected {expected}")

    @property
    def has_o_proj_bias(self) -> bool:
        """o_proj_bias, resolved."""
        return self.attention_bias if self.o_proj_bias is None else self.o_proj_bias

    @property
    def kv_heads(self) -> int:
        """num_key_value_heads, resolved."""
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def head_width(self) -> int:
        """head_dim, resolved."""
        assert self.head_dim is not None
        return self.head_dim

    def inherited(self) -> dict[str, Any]:
        """Return what position schemes leave open, where no checkpoint says it."""
        return {"theta": THETA, "original_context": self.max_position_embeddings}


FLAGS = ("tie_word_embeddings", "attention_bias", "o_proj_bias", "scale_embeddings")
CHOICES = {
    name: get_args(hint)
    for name, hint in get_type_hints(LlamaConfig).items()
    if get_origin(hint) is Literal
}
"""Values of the fields that have only a few."""
