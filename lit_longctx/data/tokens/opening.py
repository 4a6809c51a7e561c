"""Open a tokenizer by name, describe it, and compare it with a checkpoint's."""

import json
from collections.abc import Sequence
from pathlib import Path

from lit_longctx import hub
from lit_longctx.checkpoint.companions import TOKENIZER_FILES
from lit_longctx.data.tokens.fingerprint import fingerprint
from lit_longctx.data.tokens.info import TokenizerInfo
from lit_longctx.data.tokens.libraries import JsonTokenizer, SentencePieceTokenizer
from lit_longctx.data.tokens.special_tokens import (
    AddBos,
    BosRule,
    told_bos_rule,
)
from lit_longctx.data.tokens.tokenizer import ByteTokenizer, Tokenizer, byte_vocabulary
from lit_longctx.manifest import check_listed


def round_trip(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Return the share of texts whose ids decode to exactly the text; 1 if there is no text."""
    found = tokenizer.encode(texts)
    same = [tokenizer.decode(i.tolist()) == text for i, text in zip(found, texts, strict=True)]
    return sum(same) / len(same) if same else 1.0


def tokenizer_info(tokenizer: Tokenizer) -> TokenizerInfo:
    """Return what a manifest records of a tokenizer."""
    return TokenizerInfo(
        tokenizer.fingerprint,
        tokenizer.vocab_size,
        tokenizer.bos,
        tokenizer.eos,
        add_bos=tokenizer.bos_rule.added,
    )


def describe_borders(tokenizer: Tokenizer, chat: bool) -> str:
    """Say which tokens begin and end documents or conversations, and why, in two lines."""
    added, why = tokenizer.bos_rule
    begins, ends = f"begins {'every' if added else 'no'} document", "ends every document"
    if chat:
        begins = "begins every conversation" if added else "stands where the chat template has it"
        ends = "stands where the chat template has it"
    named_by = tokenizer.sources
    return (
        f"BOS {tokenizer.bos} {tokenizer.bos_token!r} (from {named_by['bos']}) {begins} ({why})\n"
        f"EOS {tokenizer.eos} {tokenizer.eos_token!r} (from {named_by['eos']}) {ends}"
    )


def open_tokenizer(
    name: str, bos: str | None = None, eos: str | None = None, add_bos: AddBos = "auto"
) -> Tokenizer:
    """Return the tokenizer of that name.

    Args:
        name: `bytes`, a tokenizer.json, a tokenizer.model, or a folder or Hub name that holds one
            of them; of both, tokenizer.json.
        bos: Token that begins documents; default: tokenizer_config.json's.
        eos: Token that ends documents; default: tokenizer_config.json's.
        add_bos: Whether texts begin with BOS; `auto`: if `bos` is given, or else as the files say.

    Raises:
        ValueError: There is none, or it is not the one that its folder's manifest lists.
    """
    if name == "bytes":
        if bos or eos:
            raise ValueError("tokenizer 'bytes' has its own BOS and EOS; leave --bos and --eos out")
        return ByteTokenizer(told_bos_rule(None, add_bos))
    found = hub.folder(name, hub.TOKENIZER_FILES) if hub.is_name(name) else Path(name)
    file = _file_of(found)
    if file is None:
        expected = "'bytes', a tokenizer.json, a tokenizer.model or their folder"
        raise ValueError(f"tokenizer {name!r} not found; expected {expected}")
    check_listed(file.parent, (file.name, *TOKENIZER_FILES))
    if file.suffix == ".model":
        return SentencePieceTokenizer(file, bos, eos, add_bos)
    if not (bos or eos) and _is_bytes(file):
        return ByteTokenizer(told_bos_rule(None, add_bos) or _byte_rule(file))
    return JsonTokenizer(file, bos, eos, add_bos)


def fingerprint_of(
    folder: str | Path, bos: int | None = None, eos: int | None = None
) -> str | None:
    """Return the fingerprint of the tokenizer in a checkpoint's folder; None if it has none.

    Args:
        folder: Folder that may hold a tokenizer.json or a tokenizer.model.
        bos: Id that the data begins documents with; default: what the folder's config says, which
            is another one where `prepare` was told --bos.
        eos: Id that the data ends documents with; default likewise.

    Raises:
        ValueError: The tokenizer is broken, or does not name a BOS or EOS that is not given.
    """
    file = _file_of(Path(folder)) if Path(folder).is_dir() else None
    if file is None:
        return None
    if bos is None or eos is None or (file.suffix == ".json" and _is_bytes(file)):
        return open_tokenizer(str(file)).fingerprint
    return fingerprint(file, bos, eos)


def check_tokenizer(data: TokenizerInfo, vocab_size: int, folder: Path | None) -> None:
    """Refuse data whose ids are not the model's.

    Args:
        data: What the data's manifest says of its tokenizer; `largest_id`, the largest in use, is
            all of the vocabulary that the model must have.
        vocab_size: The model's.
        folder: The checkpoint's tokenizer, if it has one.

    Raises:
        ValueError: An id is beyond the vocabulary, or the checkpoint has another tokenizer.
    """
    largest = data.vocab_size - 1 if data.largest_id is None else data.largest_id
    if largest >= vocab_size:
        used = f", and uses id {largest}" if data.largest_id is not None else ""
        raise ValueError(
            f"data has a vocabulary of {data.vocab_size}, larger than the model's "
            f"{vocab_size}{used}; prepare the data with the model's tokenizer"
        )
    own = fingerprint_of(folder, data.bos, data.eos) if folder else None
    if own is not None and own != data.fingerprint:
        raise ValueError(
            f"data has a tokenizer of fingerprint {data.fingerprint[:12]}, the checkpoint one "
            f"of {own[:12]}; prepare the data with --tokenizer {folder}"
        )


def _file_of(path: Path) -> Path | None:
    places = [path / "tokenizer.json", path / "tokenizer.model"] if path.is_dir() else [path]
    return next((place for place in places if place.is_file()), None)


def _byte_rule(file: Path) -> BosRule | None:
    """Read of a saved ByteTokenizer whether it begins texts with BOS; the first version did."""
    found = json.loads(file.read_text(encoding="utf-8")).get("post_processor")
    return (
        BosRule(bool(found["special_tokens"]), "tokenizer.json's post-processor") if found else None
    )


def _is_bytes(file: Path) -> bool:
    """Whether a tokenizer.json is the one that ByteTokenizer writes."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        model, added = found["model"], [token["content"] for token in found["added_tokens"]]
        same = model["vocab"] == byte_vocabulary() and not model["merges"]
        return same and added == ["<bos>", "<eos>"] and found["normalizer"] is None
    except (ValueError, KeyError, TypeError):
        return False
