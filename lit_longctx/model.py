"""Llama from scratch (Touvron et al. 2023, arXiv:2307.09288), with the position scheme left open.

Modules carry Hugging Face's names, so a safetensors folder loads with no renaming table. Nothing
here knows of Lightning, data or sharding: those are done to it from outside.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_longctx.attention import AttentionBackend, AttnImplementation, attention_backend
from lit_longctx.batch import Batch, Documents, one_document
from lit_longctx.head import token_hits, token_nats, weighted_loss
from lit_longctx.memory import Memory
from lit_longctx.position import PositionScheme


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a Llama; fields are those of Hugging Face's config.json."""

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

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
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


class Cache:
    """Keys and values of what was read so far, for decoding; every row is one document.

    Args:
        num_layers: Blocks of the model.
        planned: Places that will be read in the end, padding, prompt and continuation; they are
            allocated at once. Schemes that depend on the document's length must know it, since
            keys in the cache cannot be turned again.
        padding: Places of each row before its document begins, where prompts differ in length;
            nothing sees them.
    """

    def __init__(
        self, num_layers: int, planned: int | None = None, padding: Sequence[int] = ()
    ) -> None:
        self.layers = [LayerCache(planned or 0) for _ in range(num_layers)]
        self.planned = planned
        self.padding = padding

    @property
    def length(self) -> int:
        """Places read so far."""
        return self.layers[0].length

    def documents(self, new: Documents) -> tuple[Documents, Documents]:
        """Return queries and keys of new places; padding is a document of its own."""
        batch, seq = new.ids.shape
        device = new.ids.device
        if len(new.boundaries) != batch + 1:
            raise ValueError("a cache needs one document per row; got packed rows; drop the cache")
        if not self.padding:
            return new, one_document(batch, self.length + seq, device)
        queries = _padded(self.padding, self.length, seq, device)
        return queries, _padded(self.padding, 0, self.length + seq, device)


def _padded(padding: Sequence[int], first: int, seq: int, device: torch.device) -> Documents:
    """Documents of `seq` places from `first`: in each row its padding, then the rest, or neither.

    All on the host but for the result: kernels need not wait for `longest`.
    """
    ends = torch.tensor(padding)
    rows = torch.arange(len(ends)) * seq
    offsets = torch.stack([rows, rows + (ends - first).clamp(0, seq)], dim=1).flatten()
    boundaries = F.pad(offsets, (0, 1), value=len(ends) * seq).int()
    ids = (torch.arange(first, first + seq) >= ends[:, None]).long()
    return Documents(ids.to(device), boundaries.to(device), int(boundaries.diff().max()))


class LayerCache:
    """Keys and values of one block, in tensors with room for what is planned; no backward pass.

    What a scheme adds to keys beyond head_dim tells their place, the same for all heads: it is
    held for one head and joined when read.
    """

    def __init__(self, planned: int = 0) -> None:
        self.planned = planned
        self.length = 0
        self.held: list[Tensor] = []

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add new places and return all of them; past the plan, the tensors double."""
        heads, dim = v.shape[2:]
        new = (k[..., :dim], k[:, :, :1, dim:], v)
        begin, self.length = self.length, self.length + k.shape[1]
        if not self.held or self.held[0].shape[1] < self.length:
            room = max(self.planned, 2 * begin, self.length)
            larger = [x.new_empty(len(x), room, *x.shape[2:]) for x in new]
            for old, held in zip(self.held, larger, strict=False):  # at first there are none
                held[:, :begin] = old[:, :begin]
            self.held = larger
        for held, part in zip(self.held, new, strict=True):
            held[:, begin : self.length] = part
        content, place, values = (held[:, : self.length] for held in self.held)
        if place.shape[-1]:
            content = torch.cat([content, place.expand(-1, -1, heads, -1)], dim=-1)
        return content, values


class Attention(nn.Module):
    """Grouped-query attention; the position scheme maps q and k, the back end does the rest."""

    def __init__(self, config: LlamaConfig, position: PositionScheme, backend: AttentionBackend):
        super().__init__()
        width, dim, bias = config.hidden_size, config.head_width, config.attention_bias
        self.head_dim = dim
        self.backend = backend
        self.q_proj = nn.Linear(width, config.num_attention_heads * dim, bias=bias)
        self.k_proj = nn.Linear(width, config.kv_heads * dim, bias=bias)
        self.v_proj = nn.Linear(width, config.kv_heads * dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, width, bias=bias)
        self.position = position.layer(config.num_attention_heads, dim)

    def forward(
        self,
        x: Float[Tensor, "batch seq width"],
        code: Float[Tensor, "batch seq code"],
        mask: object,
        cache: LayerCache | None = None,
        past: int = 0,
    ) -> Float[Tensor, "batch queries width"]:
        """Attend within documents; `code` and `mask` come from the scheme and the back end.

        The first `past` places of x are memory: keys and values, but no queries.
        """
        q, k, v = (
            rearrange(
                projection(x), "batch seq (heads dim) -> batch seq heads dim", dim=self.head_dim
            )
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.position(q, k, code)
        q = q[:, past:]
        if cache is not None:
            k, v = cache.append(k, v)
        # the scale is the content head's, also where the scheme widens q and k
        out = self.backend.attend(q, k, v, mask, self.head_dim**-0.5)
        return self.o_proj(rearrange(out, "batch seq heads dim -> batch seq (heads dim)"))


def recomputed(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Call a function but keep only its inputs for backward, which computes the rest again.

    For elementwise work before a product: it costs little time and most of a block's memory. The
    product itself is not repeated, since recomputation stops at the last tensor that backward
    needs.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm (Zhang & Sennrich 2019, arXiv:1910.07467); keeps only its input."""

    def forward(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq width"]:
        """On CUDA torch's kernel is fused and keeps no more either."""
        return super().forward(x) if x.is_cuda else recomputed(super().forward, x)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch seq width"]:
        """Map each token by itself."""
        return recomputed(self._down, self.gate_proj(x), self.up_proj(x))

    def _down(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: LlamaConfig, position: PositionScheme, backend: AttentionBackend):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, position, backend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Float[Tensor, "batch seq width"],
        code: Float[Tensor, "batch places code"],
        mask: object,
        cache: LayerCache | None = None,
        past: Float[Tensor, "batch past width"] | None = None,
    ) -> Float[Tensor, "batch seq width"]:
        """One layer; `past` are its inputs of earlier windows, if it has a memory."""
        seen = x if past is None else torch.cat([past, x], dim=1)
        length = seen.shape[1] - x.shape[1]
        x = x + self.self_attn(self.input_layernorm(seen), code, mask, cache, length)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm, under the names of Hugging Face's `model.` prefix."""

    def __init__(self, config: LlamaConfig, position: PositionScheme, backend: AttentionBackend):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, position, backend) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Llama(nn.Module):
    """A Batch in, nats per token out."""

    def __init__(
        self,
        config: LlamaConfig,
        position: PositionScheme,
        attn_implementation: AttnImplementation = "sdpa",
    ) -> None:
        super().__init__()
        self.config = config
        self.position = position
        self.backend = attention_backend(attn_implementation)
        self.model = Decoder(config, position, self.backend)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Float[Tensor, "vocab width"]:
        """Weight of the LM head: its own, or the embedding's where they are tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def hidden(
        self, batch: Batch, cache: Cache | None = None, memory: Memory | None = None
    ) -> Float[Tensor, "batch seq width"]:
        """Final hidden states, after the last norm; takes from and adds to cache or memory."""
        queries = keys = batch.documents
        places = batch.position_ids
        if cache is not None:
            queries, keys = cache.documents(batch.documents)
        elif memory is not None:
            queries, keys = memory.documents(batch)
            places = memory.places(batch)
        if cache is not None and self.position.depends_on_length:
            code = self._planned_code(places, cache)
        else:
            code = self.position.encode(places, self.config.head_width, batch.documents)
        mask = self.backend.prepare(queries, keys)
        x = self.model.embed_tokens(batch.input_ids)
        inputs = []
        for i, block in enumerate(self.model.layers):
            inputs.append(x)
            past = memory.hidden[i] if memory and memory.hidden else None
            x = block(x, code, mask, None if cache is None else cache.layers[i], past)
        if memory is not None:
            memory.advance(batch, inputs)
        return self.model.norm(x)

    def _planned_code(self, places: Tensor, cache: Cache) -> Float[Tensor, "batch seq code"]:
        """Encode places of documents that have, from the start, the length they will have."""
        if cache.planned is None:
            raise ValueError(
                f"{type(self.position).__name__} depends on the document's length, which a cache "
                "must know beforehand: Cache(num_layers, planned=prompt + new tokens)"
            )
        lengths = [cache.planned - n for n in cache.padding] or [cache.planned] * len(places)
        codes = [
            self.position.encode(row[None], self.config.head_width, one_document(1, n, row.device))
            for row, n in zip(places, lengths, strict=True)
        ]
        return torch.cat(codes)

    def forward(self, batch: Batch) -> Float[Tensor, "batch seq"]:
        """Nats of each target, float32, 0 where there is none; backward recomputes the head."""
        hidden = self.hidden(batch).flatten(0, 1)
        return token_nats(hidden, self.head_weight, batch.labels.flatten()).view(batch.labels.shape)

    def loss(
        self, batch: Batch, memory: Memory | None = None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch seq"]]:
        """(Σ loss_weights·nats with gradient, nats detached): the cheaper door, for training."""
        hidden = self.hidden(batch, memory=memory).flatten(0, 1)
        labels, weights = batch.labels.flatten(), batch.loss_weights.flatten()
        loss, nats = weighted_loss(hidden, self.head_weight, labels, weights)
        return loss, nats.view(batch.labels.shape)

    def hits(self, batch: Batch) -> tuple[Float[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """(nats, whether each target is the likeliest token), without gradient."""
        hidden, labels = self.hidden(batch).flatten(0, 1), batch.labels
        nats, hits = token_hits(hidden, self.head_weight, labels.flatten())
        return nats.view(labels.shape), hits.view(labels.shape)

    def logits(
        self, batch: Batch, cache: Cache | None = None, last: int | None = None
    ) -> Float[Tensor, "batch places vocab"]:
        """Logits of the `last` places of each row (default: all), to decode and compare.

        With a cache, `batch` holds the new tokens only.
        """
        hidden = self.hidden(batch, cache)
        return hidden[:, -(last or 0) :] @ self.head_weight.T


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
