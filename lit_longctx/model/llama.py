"""Llama from scratch (Touvron et al. 2023, arXiv:2307.09288), with the position scheme left open.

Modules carry Hugging Face's names, so a safetensors folder loads with no renaming table. Nothing
here knows of Lightning, data or sharding: those are done to it from outside.
"""

import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lit_longctx.batch import Batch
from lit_longctx.model.attention import AttnImplementation, attention_backend
from lit_longctx.model.backend import AttentionBackend, Heads, KVHeads, Values
from lit_longctx.model.config import LlamaConfig
from lit_longctx.model.head import token_nats, token_top1_correct, weighted_loss
from lit_longctx.model.keys import OWN, KeySource, LayerSource, View
from lit_longctx.model.layers import LayerPattern, Layers
from lit_longctx.position import PositionScheme
from lit_longctx.position.scheme import InheritedSettings


class Attention(nn.Module):
    """Grouped-query attention; the position scheme maps q and k, the back end does the rest."""

    def __init__(self, config: LlamaConfig, position: PositionScheme, backend: AttentionBackend):
        super().__init__()
        width, dim, bias = config.hidden_size, config.head_width, config.attention_bias
        queries, keys = config.num_attention_heads * dim, config.kv_heads * dim
        self.head_dim = dim
        self.scale = (config.query_pre_attn_scalar or dim) ** -0.5
        self.backend = backend
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, width, bias=config.has_o_proj_bias)
        widths = {"none": (None, None), "head": (dim, dim), "width": (queries, keys)}
        self.q_norm, self.k_norm = (
            nn.RMSNorm(each, eps=config.rms_norm_eps) if each else None
            for each in widths[config.qk_norm]
        )
        self.position = position.layer(config.num_attention_heads, dim)

    def forward(
        self,
        x: Float[Tensor, "batch inputs width"],
        num_queries: int,
        view: View,
        source: LayerSource,
    ) -> Float[Tensor, "batch queries width"]:
        """Attend within documents; the last `num_queries` of x are queries, all of it keys."""
        q = self.heads(self.q_proj(x), self.q_norm)
        k = self.heads(self.k_proj(x), self.k_norm)
        v = self.heads(self.v_proj(x))
        q, k = self.position(q, k, view.code)
        if view.query_factor is not None:
            q = (q * view.query_factor).to(q.dtype)
        kernel: Any = self._kernel
        out = source.attend(q[:, -num_queries:], k, v, view.mask, kernel)
        return self.o_proj(rearrange(out, "batch seq heads dim -> batch seq (heads dim)"))

    def heads(
        self, x: Float[Tensor, "batch seq features"], norm: nn.RMSNorm | None = None
    ) -> Float[Tensor, "batch seq heads head_dim"]:
        """Divide features among heads, normalised before, over as many as the norm has weights."""
        if norm is not None:
            x = norm(x.unflatten(-1, (-1, *norm.normalized_shape))).flatten(-2)
        return rearrange(x, "batch seq (heads dim) -> batch seq heads dim", dim=self.head_dim)

    @torch.compiler.disable  # a graph for every layout of documents: their sizes are guarded on
    def _kernel(self, q: Heads, k: KVHeads, v: Values, mask: Any) -> Tensor:
        """The scale is the content head's, also where the scheme widens q and k."""
        return self.backend.attend(q, k, v, mask, self.scale)


ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh")}
"""By Hugging Face's hidden_act."""


class MLP(nn.Module):
    """SwiGLU, or GeGLU, by hidden_act (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq width"]:
        """Map each token by itself."""
        return self.down(self.gate_proj(x), self.up_proj(x))

    def down(
        self, gate: Float[Tensor, "batch seq inner"], up: Float[Tensor, "batch seq inner"]
    ) -> Float[Tensor, "batch seq width"]:
        """Second half of the map; what it keeps for backward can be computed again from both."""
        return self.down_proj(self.activation(gate) * up)


NORMS = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""Hugging Face's names of the norms before and after attention, and before and after the MLP."""


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream; norm_placement says what is normed."""

    def __init__(self, config: LlamaConfig, position: PositionScheme, backend: AttentionBackend):
        super().__init__()
        self.norms = NORMS[config.norm_placement]
        # the order of parameters decides how gradient norms are summed
        self._add_norms(self.norms[:1], config)
        self.self_attn = Attention(config, position, backend)
        self._add_norms(self.norms[1:], config)
        self.mlp = MLP(config)

    def _add_norms(self, names: Sequence[str | None], config: LlamaConfig) -> None:
        for name in filter(None, names):
            self.add_module(name, nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))

    def forward(
        self,
        x: Float[Tensor, "batch seq width"],
        view: View,
        source: LayerSource,
    ) -> Float[Tensor, "batch seq width"]:
        """One layer; `view` is that of its kind."""
        inputs = self.normed(0, source.inputs(x))
        x = x + self.normed(1, self.self_attn(inputs, x.shape[1], view, source))
        return x + self.normed(3, self.mlp(self.normed(2, x)))

    def normed(self, number: int, x: Tensor) -> Tensor:
        """Apply a norm of `norms`, where there is one."""
        name = self.norms[number]
        return x if name is None else getattr(self, name)(x)


class Decoder(nn.Module):
    """Embedding, blocks and final norm, under the names of Hugging Face's `model.` prefix."""

    def __init__(self, config: LlamaConfig, layers: Layers, backend: AttentionBackend):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layers.position_of(i), backend) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.embedding_scale = config.hidden_size**0.5 if config.scale_embeddings else None

    def embedded(self, ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq width"]:
        """Embeddings of tokens, what the first block reads."""
        x = self.embed_tokens(ids)
        return x * self.embedding_scale if self.embedding_scale else x


class Llama(nn.Module):
    """A Batch in, nats per token out."""

    def __init__(
        self,
        config: LlamaConfig,
        position: PositionScheme | LayerPattern | Layers,
        attn_implementation: AttnImplementation = "auto",
    ) -> None:
        super().__init__()
        self.config = config
        self.layers = layers_of(position, config)
        self.backend = attention_backend(attn_implementation)
        self.model = Decoder(config, self.layers, self.backend)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head_chunk_tokens: int | None = None
        """Tokens whose logits exist at a time; None: by memory. Set from outside."""
        self.start: Any = None
        """Checkpoint that the weights are from; an export takes over what else belongs to it."""

    @property
    def position(self) -> PositionScheme:
        """The position scheme of all layers; ValueError where they have several."""
        return self.layers.position

    @property
    def head_weight(self) -> Float[Tensor, "vocab width"]:
        """Weight of the LM head: its own, or the embedding's where they are tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def use_layers(self, layers: Layers) -> None:
        """Give the same weights other schemes and windows, as a stage of training does.

        Raises:
            ValueError: A scheme that is exchanged has weights of its own.
        """
        schemes = zip(self.layers.by_layer, layers.by_layer, strict=True)
        for block, (old, new) in zip(self.model.layers, schemes, strict=True):
            if old.position == new.position:
                continue
            attention: Any = block.self_attn
            module = new.position.layer(self.config.num_attention_heads, self.config.head_width)
            if [*attention.position.parameters(), *module.parameters()]:
                raise ValueError(
                    f"{old.position} and {new.position} are not of one model: one of them has "
                    "weights; begin a run of its own with it"
                )
            attention.position = module
        self.layers = layers

    def hidden(self, batch: Batch, source: KeySource = OWN) -> Float[Tensor, "batch seq width"]:
        """Final hidden states, after the last norm; `source` says where keys and values are."""
        views = source.views(batch, self.layers.kinds, self.backend, self.config.head_width)
        x = self.model.embedded(batch.input_ids)
        for i, block in enumerate(self.model.layers):
            x = block(x, views[self.layers.kind_of[i]], source.layer(i))
        source.advance(batch)
        return self.model.norm(x)

    def forward(self, batch: Batch, source: KeySource = OWN) -> Float[Tensor, "batch seq"]:
        """Nats of each target, float32, 0 where there is none; backward recomputes the head."""
        hidden, labels = self.hidden(batch, source).flatten(0, 1), batch.labels
        nats = token_nats(hidden, self.head_weight, labels.flatten(), self.head_chunk_tokens)
        return nats.view(labels.shape)

    def loss(
        self, batch: Batch, source: KeySource = OWN
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch seq"]]:
        """(Σ loss_weights·nats with gradient, nats detached): the cheaper one, for training."""
        hidden = self.hidden(batch, source).flatten(0, 1)
        labels, weights = batch.labels.flatten(), batch.loss_weights.flatten()
        at_once = self.head_chunk_tokens
        loss, nats = weighted_loss(hidden, self.head_weight, labels, weights, at_once)
        return loss, nats.view(batch.labels.shape)

    def top1_correct(
        self, batch: Batch, source: KeySource = OWN
    ) -> tuple[Float[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """(nats, whether each target is the likeliest token), without gradient."""
        hidden, labels = self.hidden(batch, source).flatten(0, 1), batch.labels
        nats, top1_correct = token_top1_correct(
            hidden, self.head_weight, labels.flatten(), self.head_chunk_tokens
        )
        return nats.view(labels.shape), top1_correct.view(labels.shape)

    def logits(
        self, batch: Batch, cache: KeySource | None = None, last: int | None = None
    ) -> Float[Tensor, "batch tokens vocab"]:
        """Logits of the `last` tokens of each row (default: all), to decode and compare.

        With a cache, `batch` holds the new tokens only.
        """
        hidden = self.hidden(batch, cache or OWN)
        return hidden[:, -(last or 0) :] @ self.head_weight.T


def layers_of(
    position: PositionScheme | LayerPattern | Layers,
    config: LlamaConfig,
    source: InheritedSettings | None = None,
) -> Layers:
    """Return a model's layers, resolved; ValueError if not as many as its config says.

    Args:
        position: One scheme for all layers, a pattern of them, or the layers; fields may be open.
        config: The model's shape.
        source: What says the values that are open; default: the config.
    """
    if isinstance(position, PositionScheme):
        position = Layers.uniform(position, config.num_hidden_layers)
    if isinstance(position, LayerPattern):
        position = position.over(config.num_hidden_layers)
    if len(position.kind_of) != config.num_hidden_layers:
        raise ValueError(
            f"kind_of names {len(position.kind_of)} layers; the config has "
            f"{config.num_hidden_layers}"
        )
    for kind in position.kinds:
        kind.position.check(config.head_width)
    return position.resolved(source or config)


def chosen_device(name: str) -> str:
    """Return a device's name; `auto` is CUDA where there is one, else the CPU."""
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def initial_weight(name: str, shape: torch.Size, num_layers: int, seed: int) -> Tensor:
    """Random weights of one parameter: a function of seed and name, the same on every layout.

    Normal with standard deviation 0.02, projections into the residual stream divided by √(2·layers)
    (Radford et al. 2019, §2.3); norms 1, biases 0.
    """
    if "norm" in name:
        return torch.ones(shape)
    if "bias" in name:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    std = 0.02 / (2 * num_layers) ** 0.5 if into_residual else 0.02
    return torch.empty(shape).normal_(0.0, std, generator=generator)
