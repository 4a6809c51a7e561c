"""Greedy and sampled decoding with a cache of keys and values, of ids and of text."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lit_longctx.batch import NO_TARGET, Batch, one_document
from lit_longctx.checkpoint import open_checkpoint
from lit_longctx.checkpoint.companions import list_of
from lit_longctx.data.reading.documents import SURROGATE
from lit_longctx.data.tokens.chat_template import ChatTemplate
from lit_longctx.data.tokens.chats import Message
from lit_longctx.data.tokens.special_tokens import AddBos
from lit_longctx.data.tokens.tokenizer import Tokenizer, open_tokenizer
from lit_longctx.model import Llama, chosen_device
from lit_longctx.model.attention import AttnImplementation
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


class TextStream:
    """Text of ids that come one by one, in pieces that never split a character or a stop string.

    Ids are decoded together with a few before them, since the text of a token depends on what
    precedes it; costs a decoding of a few ids per token.
    """

    context = 6
    """Ids of the prompt that the first ones are decoded with."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
        ends: Sequence[int] = (),
    ) -> None:
        if "" in stop:
            raise ValueError("expected stop strings with characters; got an empty one; remove it")
        self.tokenizer = tokenizer
        self.stop = stop
        self.ends = {tokenizer.eos, *ends}
        self.ids = list(prompt[-self.context :])
        self.known = len(self.ids)
        self.waiting = ""
        """Text that may be the beginning of a stop string."""
        self.ended = False

    def add(self, token: int) -> str:
        """Return the text that is certain by now; nothing once ended (by EOS or a stop string)."""
        if self.ended:
            return ""
        if token in self.ends:
            return self.close()
        self.ids.append(token)
        text = self._undecided()
        if text.endswith("\ufffd"):  # bytes of a character whose others may follow
            return ""
        if text:
            self.ids, self.known = self.ids[self.known :], len(self.ids) - self.known
        return self._until_stop(text)

    def close(self) -> str:
        """Return what is left, incomplete characters as U+FFFD, since nothing follows."""
        if self.ended:
            return ""
        piece = self._until_stop(self._undecided())
        piece, self.waiting = piece + self.waiting, ""
        self.ended = True
        return piece

    def _undecided(self) -> str:
        """Text of the ids since the last piece."""
        before = self.tokenizer.decode(self.ids[: self.known])
        return self.tokenizer.decode(self.ids)[len(before) :]

    def _until_stop(self, text: str) -> str:
        """Return text up to the stop string that is first complete, or to what may become one."""
        text, self.waiting = self.waiting + text, ""
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stop]
        if complete := [ends for ends in found if ends[1] >= 0]:
            self.ended = True
            return text[: min(complete)[1]]
        lengths = (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        certain = len(text) - max(lengths, default=0)
        self.waiting = text[certain:]
        return text[:certain]


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of a prompt that begins a document; ValueError if it is no text."""
    if not prompt:
        raise ValueError("expected a prompt; got an empty one; give some text to continue")
    if lone := SURROGATE.search(prompt):
        raise ValueError(
            f"expected a prompt in UTF-8; got the lone surrogate {lone[0]!a} at character "
            f"{lone.start()}; remove it"
        )
    return [*tokenizer.prefix, *tokenizer.encode([prompt])[0].tolist()]


def ends_of(llama: Llama, tokenizer: Tokenizer) -> list[int]:
    """Return every token that ends a text: the tokenizer's EOS, and the generation config's."""
    return sorted({tokenizer.eos, *(llama.start.ends if llama.start else ())})


def stream(
    llama: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stop: Sequence[str] = (),
    prefill_tokens: int = 1024,
    ends: Sequence[int] = (),
) -> Iterator[list[str]]:
    """Yield what each new token adds to the text of each prompt, until all have ended.

    Prompts are texts that begin a document, or ids as they are. A row ends with any EOS of the
    generation config or a token of `ends`, with the first of the `stop` strings that its
    continuation completes (across tokens too; it is left out), or after max_new_tokens; its pieces
    are empty from then on. See `decode` for the rest.
    """
    encoded = [
        prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
        for prompt in prompts
    ]
    ends = [*ends_of(llama, tokenizer), *ends]
    rows = [TextStream(tokenizer, ids, stop, ends) for ids in encoded]
    given = [torch.tensor(ids, device=llama.head_weight.device) for ids in encoded]
    for tokens in decode(llama, given, max_new_tokens, sampling, ends, seed, prefill_tokens):
        yield [row.add(token) for row, token in zip(rows, tokens.tolist(), strict=True)]
        if all(row.ended for row in rows):
            return
    yield [row.close() for row in rows]


def generate_text(
    checkpoint: str,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    tokenizer: str | None = None,
    add_bos: AddBos = "auto",
    chat: bool = False,
    system: str | None = None,
    chat_template: str | None = None,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop: list[str] | str | None = None,
    prefill_tokens: int = 1024,
    attn_implementation: AttnImplementation = "sdpa",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
) -> str:
    """Continue a prompt and print it, the continuation as it comes; or answer it as a chat does.

    Args:
        checkpoint: Run folder, Hugging Face folder, or Hub name (org/name, org/name@revision).
        prompt: Text to continue, which begins a document; in a chat, what the user says. `-` reads
            it from standard input.
        max_new_tokens: Most tokens to add.
        temperature: 0 for the likeliest token each time; higher is more random.
        seed: Decides the random choices.
        tokenizer: `bytes` or a tokenizer.json; default: the checkpoint's own.
        add_bos: Whether the prompt begins with BOS; `auto`: as `transformers` has it of the
            tokenizer's files.
        chat: Put the prompt into the checkpoint's chat template and print the answer alone.
        system: System prompt of the chat.
        chat_template: Jinja file, or `plain` for one of ours; default: the tokenizer's own.
        top_k: Draw from so many of the likeliest tokens; default: all.
        top_p: Draw from the fewest likeliest tokens that have this probability.
        stop: Text, or list of texts, before which the continuation ends.
        prefill_tokens: Prompt tokens to read at a time; fewer need less memory.
        attn_implementation: Attention back end.
        dtype: Of weights, keys and values.
        device: `cpu`, `cuda`, or `auto` for CUDA where there is one.
    """
    sampling = Sampling(temperature, top_k, top_p)
    start = open_checkpoint(checkpoint)
    own = tokenizer or start.tokenizer
    if own is None:
        raise ValueError(f"{checkpoint} has no tokenizer; pass --tokenizer")
    opened = open_tokenizer(str(own), add_bos=add_bos)
    template = template_of(opened, chat, system, chat_template)
    if prompt == "-":
        prompt = sys.stdin.read()
        prompt = prompt.removesuffix("\n") if chat else prompt
    given = asked(template, prompt, system) if template else prompt
    ends = [template.end_of_turn] if template else []
    llama = start.load(chosen_device(device), getattr(torch, dtype), attn_implementation).eval()
    stops = [stop] if isinstance(stop, str) else stop or []
    pieces = stream(
        llama, opened, [given], max_new_tokens, sampling, seed, stops, prefill_tokens, ends
    )
    return printed("" if chat else prompt, (piece for (piece,) in pieces))


def printed(text: str, pieces: Iterator[str]) -> str:
    """Print a text and what follows, piece by piece; return all of it."""
    text += next(pieces)  # before anything is printed, so that an error stands alone
    print(text, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def template_of(
    tokenizer: Tokenizer, chat: bool, system: str | None, chat_template: str | None
) -> ChatTemplate | None:
    """Return the chat template if there is to be a chat; ValueError if only its settings are."""
    if not chat and (system or chat_template):
        raise ValueError("expected --chat true with a system prompt or a chat template; add it")
    return ChatTemplate(tokenizer, chat_template) if chat else None


def asked(template: ChatTemplate, prompt: str, system: str | None) -> list[int]:
    """Return the ids of a chat that begins with what the user says, perhaps a system prompt."""
    said = [Message("system", system)] if system else []
    return template.prompt([*said, Message("user", prompt)]).tolist()
