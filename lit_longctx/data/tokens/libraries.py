"""Tokenizers of tokenizer.json and sentencepiece, with BOS as transformers has it."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

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
from lit_longctx.data.tokens.tokenizer import Ids, Tokenizer, begun_by


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
