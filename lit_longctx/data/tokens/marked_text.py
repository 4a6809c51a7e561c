"""Text → ids, special tokens only where they are marked.

Every special token has a mark that no text has, a number between NULs. A tokenizer whose special
tokens have such names reads both at once, and what looks like a special token elsewhere as text.
"""

import json
import re
from collections.abc import Callable

import tokenizers
from tokenizers import AddedToken

from lit_longctx.data.tokens.libraries import JsonTokenizer, SentencePieceTokenizer
from lit_longctx.data.tokens.special_tokens import read_config
from lit_longctx.data.tokens.tokenizer import ByteTokenizer, Tokenizer

MARK = re.compile(r"\0(\d+)\0")
"""What `mark` makes."""
NONCHARACTER = "\U0010ffff"
"""In no text, and so in no token of sentencepiece but the bytes."""
Encode = Callable[[str], tuple[list[int], list[tuple[int, int]]]]
"""Text with special tokens by their marks → ids, and the characters that each is made of."""


def mark(number: int) -> str:
    """Return what stands for a message or a special token: no text that is fit has NUL in it."""
    return f"\0{number}\0"


def reader(tokenizer: Tokenizer, source: str) -> tuple[dict[str, int], Encode]:
    """Return the special tokens of a template, and what reads text in which they are marked.

    They are the tokenizer's special tokens and, as for `transformers`' `sanitize_control_tokens`,
    other added tokens that the template writes.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        return sentencepiece_reader(tokenizer, source)
    model = library(tokenizer)
    specials = {
        token.content: number
        for number, token in model.get_added_tokens_decoder().items()
        if token.special or (token.content in source and not token.content.isspace())
    }
    specials |= borders(tokenizer)
    twin = renamed(model, {text: mark(number) for text, number in specials.items()})

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = twin.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    return specials, encode


def borders(tokenizer: Tokenizer) -> dict[str, int]:
    """Return BOS and EOS, which need not be special tokens."""
    return {tokenizer.bos_token: tokenizer.bos, tokenizer.eos_token: tokenizer.eos}


def library(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Return what encodes for a tokenizer."""
    if isinstance(tokenizer, ByteTokenizer):
        return tokenizer.as_bpe()
    assert isinstance(tokenizer, JsonTokenizer)
    return tokenizer.model


def renamed(model: tokenizers.Tokenizer, names: dict[str, str]) -> tokenizers.Tokenizer:
    """Return the same tokenizer with other names for some added tokens.

    Raises:
        ValueError: One of them is not found wherever it stands.
    """
    found = json.loads(model.to_str())
    inner = found["model"]
    for token in found["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    if isinstance(inner["vocab"], dict):
        inner["vocab"] = {names.get(text, text): i for text, i in inner["vocab"].items()}
    else:  # Unigram: pairs of a piece and its score
        inner["vocab"] = [[names.get(text, text), score] for text, score in inner["vocab"]]
    if "unk_token" in inner:
        inner["unk_token"] = names.get(inner["unk_token"], inner["unk_token"])
    found["post_processor"] = None  # trims offsets
    twin = tokenizers.Tokenizer.from_str(json.dumps(found))
    missing = set(names.values()) - {token["content"] for token in found["added_tokens"]}
    twin.add_special_tokens([AddedToken(name, special=True) for name in missing])
    for text, name in names.items():
        if model.token_to_id(text) not in twin.encode(f"a{name}a").ids:
            raise ValueError(
                f"special token {text!r} is read as text beside other text; set its normalized and "
                "single_word to false in tokenizer.json"
            )
    return twin


def sentencepiece_reader(
    tokenizer: SentencePieceTokenizer, source: str
) -> tuple[dict[str, int], Encode]:
    """Read by sentencepiece what stands between control symbols; see `reader`.

    Only what begins the text gets sentencepiece's leading space, as in `transformers`. User-defined
    symbols stay single tokens wherever they are.
    """
    added = read_config(tokenizer.file.parent).get("added_tokens_decoder", {})
    for number, token in added.items():
        if int(number) >= tokenizer.vocab_size and token["content"] in source:
            raise ValueError(
                f"{tokenizer.file} has no token {token['content']!r}, which the chat template "
                "writes; save the tokenizer as tokenizer.json"
            )
    model = tokenizer.model
    if sum(map(model.is_byte, model.encode(NONCHARACTER))) != len(NONCHARACTER.encode()):
        raise ValueError(f"{tokenizer.file} has no byte fallback; save it as tokenizer.json")
    control = [number for number in range(tokenizer.vocab_size) if model.is_control(number)]
    specials = {model.id_to_piece(number): number for number in control}

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, offsets, at = [], [], 0
        for turn, run in enumerate(MARK.split(text)):
            if turn % 2:
                ids.append(int(run))
                offsets.append((at, at := at + len(run) + 2))
                continue
            before = NONCHARACTER if at else ""  # takes the leading space, merges with nothing
            found = model.encode(before + run, out_type="offset_mapping")
            for number, (start, stop) in zip(found["ids"], found["offsets"], strict=True):
                if start >= len(before):
                    ids.append(number)
                    offsets.append((at + start - len(before), at + stop - len(before)))
            at += len(run)
        return ids, offsets

    return specials | borders(tokenizer), encode
