"""Text ↔ token ids, such that no text can forge the token that begins a document."""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from lit_longctx import hub
from lit_longctx.data.tokens.fingerprint import fingerprint
from lit_longctx.data.tokens.special_tokens import (
    FAST,
    LLAMA,
    AddBos,
    BosRule,
    bos_rule_of_model,
    named,
    read_config,
    save_config,
    source_of,
    told_bos_rule,
    unnamed,
)

Ids = np.ndarray
"""One-dimensional array of token ids."""


class Tokenizer(ABC):
    """What the data side needs to know of a tokenizer."""

    vocab_size: int
    """Ids are below this."""
    bos: int
    """Id that begins documents and prompts, if `adds_bos`."""
    eos: int
    """Id that ends every document."""
    bos_token: str
    """Text of BOS."""
    eos_token: str
    """Text of EOS."""
    bos_rule: BosRule = BosRule(True, "the tokenizer")
    """Whether documents and prompts begin with BOS."""
    sources: Mapping[str, str] = MappingProxyType({"bos": "bytes", "eos": "bytes"})
    """Who named BOS and EOS, for reports."""

    @property
    def prefix(self) -> list[int]:
        """What documents and prompts begin with: BOS, or nothing."""
        return [self.bos] if self.bos_rule.added else []

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, without BOS and EOS; special tokens in the text are plain text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens left out."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write the tokenizer and tokenizer_config.json, as Hugging Face reads them."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids: data and model must agree on it."""


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte, then BOS 256 and EOS 257; needs no file, knows every language."""

    vocab_size = 258
    bos, bos_token = 256, "<bos>"
    eos, eos_token = 257, "<eos>"

    def __init__(self, rule: BosRule | None = None) -> None:
        self.bos_rule = rule or BosRule(True, "as bytes do")

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """UTF-8 bytes of each text."""
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the bytes; invalid sequences become U+FFFD."""
        found = np.asarray(ids, dtype=np.int64)
        return found[found < 256].astype(np.uint8).tobytes().decode(errors="replace")

    def save(self, folder: str | Path) -> None:
        """Write the same mapping as a byte-level BPE without merges, with ids equal to bytes."""
        bpe = self.as_bpe()
        bpe.post_processor = begun_by(self).post_processor
        bpe.save(str(Path(folder) / "tokenizer.json"))
        save_config(Path(folder), FAST, "<bos>", "<eos>")

    def as_bpe(self) -> tokenizers.Tokenizer:
        """Return the same as a tokenizer.json would hold it: byte-level BPE without merges."""
        bpe = tokenizers.Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
        bpe.decoder = decoders.ByteLevel()  # pyright: ignore
        bpe.add_special_tokens(
            [AddedToken("<bos>", special=True), AddedToken("<eos>", special=True)]
        )
        return bpe

    @property
    def fingerprint(self) -> str:
        """Constant: bytes do not change."""
        return "bytes-258"


def _byte_vocabulary() -> dict[str, int]:
    """The printable letter by which byte-level BPE writes each byte (GPT-2's table) → the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = iter(range(256, 512))
    return {chr(b if b in printable else next(others)): b for b in range(256)}


class JsonTokenizer(Tokenizer):
    """Any Hugging Face tokenizer.json; BOS and EOS from `bos`, `eos` or tokenizer_config.json.

    Texts begin with BOS where the file's post-processor puts it there, as in transformers 5, or the
    caller; what add_bos_token says in tokenizer_config.json does not count beside that.
    """

    def __init__(
        self,
        file: str | Path,
        bos: str | None = None,
        eos: str | None = None,
        add_bos: AddBos = "auto",
    ) -> None:
        self.file = Path(file)
        try:
            self.model = tokenizers.Tokenizer.from_file(str(self.file))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"{self.file} is no tokenizer.json: {error}") from None
        # despite its name: encode special tokens *as text*, else "<s>" in a document becomes BOS
        self.model.encode_special_tokens = True
        self.model.no_padding()
        self.model.no_truncation()
        self.vocab_size = max(self.model.get_vocab(with_added_tokens=True).values()) + 1
        self.sources = {
            role: source_of(role, token, self.file.parent)
            for role, token in (("bos", bos), ("eos", eos))
        }
        self._begin(bos, eos, told_bos_rule(bos, add_bos))

    def _begin(self, bos: str | None, eos: str | None, told: BosRule | None) -> None:
        """Find out BOS and EOS, and whether BOS begins texts."""
        before = self._before_text()
        if told is None and len(before) > 1:
            tokens = " ".join(str(self.model.id_to_token(number)) for number in before)
            raise ValueError(
                f"{self.file} puts {tokens} before a text; expected BOS; pass --add_bos"
            )
        self.bos_rule = told or BosRule(bool(before), "tokenizer.json's post-processor")
        config = read_config(self.file.parent)
        if bos is None and config.get("bos_token", "") is None and not self.bos_rule.added:
            self.eos_token, self.eos = self._special("eos", eos)  # as Qwen's: there is no BOS
            self.bos_token, self.bos = self.eos_token, self.eos
            self.sources = {**self.sources, "bos": "EOS"}
        else:
            self.bos_token, self.bos = self._special("bos", bos)
            self.eos_token, self.eos = self._special("eos", eos)
        if told is None and before not in ([], [self.bos]):  # not the one that the config names
            self.bos, self.bos_token = before[0], str(self.model.id_to_token(before[0]))
            self.sources = {**self.sources, "bos": "tokenizer.json's post-processor"}
        self._writes_prefix = before == self.prefix

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the file anew elsewhere: copies would forget how special tokens are read."""
        return JsonTokenizer, (self.file, self.bos_token, self.eos_token, self.bos_rule.added)

    def _before_text(self) -> list[int]:
        """Special tokens that the file itself puts in front of a text."""
        for text in ("a", "0", ".", "\u2581"):  # a vocabulary of words may not know all of them
            found = self.model.encode(text)
            if 0 in found.special_tokens_mask:
                return found.ids[: found.special_tokens_mask.index(0)]
        return []

    def _special(self, role: str, token: str | None) -> tuple[str, int]:
        token = named(self.file.parent, role) if token is None else token
        if token is None:
            raise unnamed(self.file.parent, role)
        number = self.model.token_to_id(token)
        if number is None:
            raise ValueError(f"{self.file} has no token {token!r} for {role.upper()}")
        return token, number

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text; the library spreads a batch over the processor's cores."""
        found = self.model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=_dtype(self.vocab_size)) for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens left out."""
        return self.model.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Copy tokenizer.json, and tokenizer_config.json with the BOS and EOS in use.

        Where the file itself begins texts otherwise than is done here, its post-processor is
        replaced, so that transformers begins them as here.
        """
        target, add_bos = Path(folder) / "tokenizer.json", None
        if self._writes_prefix:
            shutil.copyfile(self.file, target)
        else:
            add_bos = self.bos_rule.added
            found = json.loads(self.file.read_text(encoding="utf-8"))
            found["post_processor"] = json.loads(begun_by(self).to_str())["post_processor"]
            target.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
        config = read_config(self.file.parent) or FAST
        save_config(Path(folder), config, self.bos_token, self.eos_token, add_bos)

    @property
    def fingerprint(self) -> str:
        """Hash of what decides ids in tokenizer.json, with BOS and EOS."""
        return fingerprint(self.file, self.bos, self.eos)


def begun_by(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Return an empty tokenizer whose post-processor begins texts as the given one does."""
    begin = f"{tokenizer.bos_token} " * len(tokenizer.prefix)
    found = tokenizers.Tokenizer(models.BPE())
    found.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single=f"{begin}$A",
        pair=f"{begin}$A {begin}$B",
        special_tokens=[(tokenizer.bos_token, tokenizer.bos)] if begin else [],
    )
    return found


def _dtype(vocab_size: int) -> type[np.generic]:
    return np.uint16 if vocab_size <= 2**16 else np.int32


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece tokenizer.model; BOS and EOS from `bos`, `eos`, its config or the model.

    Control symbols such as <s> are plain text where a text holds them. User-defined symbols are
    single tokens wherever they occur, as the model's author wants; as BOS they could be forged.
    """

    def __init__(
        self,
        file: str | Path,
        bos: str | None = None,
        eos: str | None = None,
        add_bos: AddBos = "auto",
    ) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise ValueError(
                f"{file} needs the package sentencepiece; pip install 'lit_longctx[hf]'"
            ) from None
        self.file = Path(file)
        try:
            self.model = SentencePieceProcessor(model_file=str(self.file))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{self.file} is no sentencepiece model: {error}") from None
        self.vocab_size = self.model.get_piece_size()
        self.bos_token, self.bos = self._special("bos", bos, self.model.bos_id())
        self.eos_token, self.eos = self._special("eos", eos, self.model.eos_id())
        told = told_bos_rule(bos, add_bos)
        self.bos_rule = told or bos_rule_of_model(self.file.parent)
        self.sources = {
            role: source_of(role, token, self.file.parent)
            for role, token in (("bos", bos), ("eos", eos))
        }

    def _special(self, role: str, token: str | None, own: int) -> tuple[str, int]:
        token = named(self.file.parent, role) if token is None else token
        if token is None and own >= 0:
            token = self.model.id_to_piece(own)
        if token is None:
            raise unnamed(self.file.parent, role)
        number = self.model.piece_to_id(token)  # <unk> if there is none
        if self.model.id_to_piece(number) != token:
            raise ValueError(f"{self.file} has no token {token!r} for {role.upper()}")
        return token, number

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text; the library spreads a batch over the processor's cores."""
        found = self.model.encode(list(texts), out_type=int)
        return [np.asarray(ids, dtype=_dtype(self.vocab_size)) for ids in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control symbols left out."""
        return self.model.decode([int(i) for i in ids])

    def save(self, folder: str | Path) -> None:
        """Copy tokenizer.model, and tokenizer_config.json with the BOS and EOS in use.

        transformers opens it as LlamaTokenizer, unless the config came with another class. It has
        rules of its own for spaces at the beginning of a text.
        """
        shutil.copyfile(self.file, Path(folder) / "tokenizer.model")
        config = read_config(self.file.parent) or LLAMA
        save_config(Path(folder), config, self.bos_token, self.eos_token, self.bos_rule.added)

    @property
    def fingerprint(self) -> str:
        """Hash of tokenizer.model with BOS and EOS."""
        return fingerprint(self.file, self.bos, self.eos)


def round_trip(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Return the share of texts whose ids decode to exactly the text; 1 if there is no text."""
    found = tokenizer.encode(texts)
    same = [tokenizer.decode(i.tolist()) == text for i, text in zip(found, texts, strict=True)]
    return sum(same) / len(same) if same else 1.0


def described(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what a manifest says of a tokenizer; `add_bos` only where that is false."""
    names = ("fingerprint", "vocab_size", "bos", "eos")
    found = {name: getattr(tokenizer, name) for name in names}
    return found if tokenizer.bos_rule.added else {**found, "add_bos": False}


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


def check_tokenizer(data: Mapping[str, Any], vocab_size: int, folder: Path | None) -> None:
    """Refuse data whose ids are not the model's.

    Args:
        data: What the data's manifest says of its tokenizer; `largest_id`, the largest in use, is
            all of the vocabulary that the model must have.
        vocab_size: The model's.
        folder: The checkpoint's tokenizer, if it has one.

    Raises:
        ValueError: An id is beyond the vocabulary, or the checkpoint has another tokenizer.
    """
    if data.get("largest_id", data["vocab_size"] - 1) >= vocab_size:
        used = f", and uses id {data['largest_id']}" if "largest_id" in data else ""
        raise ValueError(
            f"data has a vocabulary of {data['vocab_size']}, larger than the model's "
            f"{vocab_size}{used}; prepare the data with the model's tokenizer"
        )
    own = fingerprint_of(folder, data["bos"], data["eos"]) if folder else None
    if own is not None and own != data["fingerprint"]:
        raise ValueError(
            f"data has a tokenizer of fingerprint {data['fingerprint'][:12]}, the checkpoint one "
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
        same = model["vocab"] == _byte_vocabulary() and not model["merges"]
        return same and added == ["<bos>", "<eos>"] and found["normalizer"] is None
    except (ValueError, KeyError, TypeError):
        return False
