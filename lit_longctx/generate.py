"""Greedy and sampled decoding with a cache of keys and values, of ids and of text."""

import sys
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from lit_longctx.checkpoint import open_checkpoint
from lit_longctx.data.reading.documents import SURROGATE
from lit_longctx.data.tokens.chat_template import ChatTemplate
from lit_longctx.data.tokens.chats import Message
from lit_longctx.data.tokens.opening import open_tokenizer
from lit_longctx.data.tokens.special_tokens import AddBos
from lit_longctx.data.tokens.tokenizer import Tokenizer
from lit_longctx.decoding import GREEDY, Sampling, decode
from lit_longctx.model import Llama, chosen_device
from lit_longctx.model.attention import AttnImplementation


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
    attn_implementation: AttnImplementation = "auto",
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
        attn_implementation: Attention back end; `auto`: varlen on CUDA in bf16 or fp16, else sdpa.
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
