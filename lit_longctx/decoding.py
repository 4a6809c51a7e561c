"""Decode with a cache: prompts of different lengths in one batch, greedily or by sampling."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lit_longctx.batch import NO_TARGET, Batch, one_document
from lit_longctx.checkpoint.companions import list_of
from lit_longctx.model import Llama
from lit_longctx.model.cache import Cache


def reading(ids: Int[Tensor, "batch seq"], past: int = 0) -> Batch:
    """Return a batch to read from: one document per row, no targets, `past` tokens read before."""
    batch, seq = ids.shape
    positions = torch.arange(past, past + seq, device=ids.device).expand(batch, seq)
    rows = torch.zeros(batch, dtype=torch.long, device=ids.device)
    return Batch(
        input_ids=ids,
        labels=torch.full_like(ids, NO_TARGET),
        loss_weights=torch.zeros(ids.shape, device=ids.device),
        position_ids=positions,
        sources=rows,
        samples=rows,
        documents=one_document(batch, seq, ids.device),
    )


@dataclass(frozen=True)
class Sampling:
    """How the next token follows from its logits."""

    temperature: float = 0.0
    """0 takes the likeliest token; otherwise logits are divided by it."""
    top_k: int | None = None
    """Draw from so many of the likeliest tokens; default: all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that have this probability (Holtzman et al. 2019)."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more; got {self.temperature}; use 0 or 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be 1 or more; got {self.top_k}; leave it out for all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1]; got {self.top_p}; use 1 for all tokens")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            raise ValueError("top_k and top_p expect a temperature above 0; got 0; set temperature")

    def probs(self, logits: Float[Tensor, "batch vocab"]) -> Float[Tensor, "batch vocab"]:
        """Probabilities to draw with, for a temperature above 0; float32."""
        logits = logits.float() / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        probs = logits.softmax(-1)
        if self.top_p < 1:
            likeliest, tokens = probs.sort(descending=True)
            before = likeliest.cumsum(-1) - likeliest
            kept = likeliest.masked_fill(before >= self.top_p, 0.0)
            probs = torch.zeros_like(probs).scatter(-1, tokens, kept)
        return probs / probs.sum(-1, keepdim=True)

    def choose(
        self, logits: Float[Tensor, "batch vocab"], generator: torch.Generator
    ) -> Int[Tensor, " batch"]:
        """Return one token per row."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(self.probs(logits), 1, generator=generator)[:, 0]


GREEDY = Sampling()


def decode(
    llama: Llama,
    prompts: Sequence[Int[Tensor, " _"]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos: int | Sequence[int] | None = None,
    seed: int = 0,
    prefill_tokens: int = 1024,
) -> Iterator[Int[Tensor, " batch"]]:
    """Yield the next token of every prompt, until all have met an `eos` or there are enough.

    Shorter prompts are padded in front; nothing sees the padding and positions are counted from the
    prompt's own beginning, so that each row is what it would be alone (its draws are not: all rows
    share one generator). After an `eos`, a row goes on with it.

    Schemes that depend on a document's length take it to be prompt + max_new_tokens throughout.

    Args:
        llama: The model.
        prompts: Ids of each row, of any lengths.
        max_new_tokens: Most tokens to add to each.
        sampling: How a token is chosen.
        eos: Token, or tokens, each of which ends a row.
        seed: Decides the random choices.
        prefill_tokens: Prompt tokens to read at a time, over all rows: bounds what a long prompt
            needs besides its keys and values.

    Raises:
        ValueError: A prompt is empty, or the scheme does not reach so far.
    """
    cache = _planned(llama, [len(prompt) for prompt in prompts], max_new_tokens)
    longest = max(len(prompt) for prompt in prompts)
    new = torch.stack([F.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    generator = torch.Generator(new.device).manual_seed(seed)
    ended = torch.zeros(len(new), dtype=torch.bool, device=new.device)
    ends = new.new_tensor(list_of(eos))
    last = new[:, -1]
    for _ in range(max_new_tokens):
        chosen = sampling.choose(_read(llama, new, cache, prefill_tokens), generator)
        last = torch.where(ended, last, chosen)
        ended |= torch.isin(last, ends)
        yield last
        if ended.all():
            return
        new = last[:, None]


def _planned(llama: Llama, lengths: Sequence[int], max_new_tokens: int) -> Cache:
    """Return an empty cache for prompts of such lengths; refuse now what would fail in the end."""
    if not lengths or min(lengths) < 1:
        raise ValueError("expected at least one token per prompt; got an empty one; begin with BOS")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more; got {max_new_tokens}; raise it")
    longest = max(lengths)
    planned = longest + max_new_tokens
    last = torch.tensor([[planned - 1]])
    documents = one_document(1, 1)._replace(token_lengths=torch.tensor([[planned]]))
    for kind in llama.layers.kinds:
        kind.position.encode(last, llama.config.head_width, documents)
    padding = [longest - n for n in lengths] if min(lengths) < longest else []
    return Cache(llama.config.num_hidden_layers, planned, padding)


@torch.inference_mode()  # here and not around `yield`, which would put the caller into it too
def _read(
    llama: Llama, new: Int[Tensor, "batch seq"], cache: Cache, prefill_tokens: int
) -> Float[Tensor, "batch vocab"]:
    """Read new tokens, a few of each row at a time; return the logits after the last."""
    if prefill_tokens < 1:
        raise ValueError(f"prefill_tokens must be 1 or more; got {prefill_tokens}; raise it")
    logits = new.new_empty(0)
    for part in new.split(max(1, prefill_tokens // len(new)), dim=1):
        batch = reading(part, cache.length)
        if cache.padding:
            before = torch.tensor(cache.padding, device=new.device)[:, None]
            batch = batch.with_position_ids((batch.position_ids - before).clamp(min=0))
        logits = llama.logits(batch, cache, last=1)[:, 0]
    return logits


def generate(
    llama: Llama,
    prompt: Int[Tensor, "batch prompt"],
    max_new_tokens: int,
    temperature: float = 0.0,
    eos: int | Sequence[int] | None = None,
    seed: int = 0,
    *,
    top_k: int | None = None,
    top_p: float = 1.0,
    prefill_tokens: int = 1024,
) -> Int[Tensor, "batch total"]:
    """Continue prompts of equal length; `decode` takes any lengths and says what arguments mean.

    Returns:
        Prompt and continuation; a row goes on with an `eos` after it has met it.
    """
    sampling = Sampling(temperature, top_k, top_p)
    found = decode(llama, list(prompt), max_new_tokens, sampling, eos, seed, prefill_tokens)
    return torch.cat([prompt, torch.stack(list(found), dim=1)], dim=1)
