"""What belongs to a model beside its weights: tokenizer, chat template, generation config."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lit_longctx import manifest
from lit_longctx.json_file import read_object

CHAT_TEMPLATE = "chat_template.jinja"
"""File beside a tokenizer that says how its model wants to be talked to."""
MORE_TEMPLATES = "additional_chat_templates"
"""Folder of further templates, by name."""
GENERATION = "generation_config.json"
"""File beside a model, or its tokenizer, that says which tokens end a text."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    CHAT_TEMPLATE,
)
START = "start"
"""Folder of a run that keeps what belongs to the checkpoint it started from."""
TOKENIZER = "tokenizer"
"""Folder of a run, or of prepared data, that holds the tokenizer in use."""
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of config.json that name special tokens."""


@dataclass(frozen=True)
class Companions:
    """Folders that a model's companions are in: those of its start come before its data's."""

    start: Path | None = None
    """Of the model, or of the checkpoint that its run started from."""
    data: Path | None = None
    """Tokenizer of the data that its run was trained on."""
    given: Path | None = None
    """Tokenizer that the user chose instead."""

    @staticmethod
    def of_run(run: Path) -> "Companions":
        """Return those of a run folder."""
        start, data = run / START, run / TOKENIZER
        return Companions(start if start.is_dir() else None, data if data.is_dir() else None)

    @staticmethod
    def check(run: Path) -> None:
        """Compare what a run folder keeps of its start and its data with its hashes.

        Raises:
            ValueError: A file is missing, torn or altered.
        """
        for folder in (run / START, run / TOKENIZER):
            if manifest.is_sealed(folder):
                manifest.check_listed(folder, manifest.read(folder)["files"])

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the tokenizer files that go with the model: the start's, else the data's."""
        nested = self.start and self.start / TOKENIZER
        folders = (self.given, self.start, nested, self.data)
        return next((folder for folder in folders if folder and _has_tokenizer(folder)), None)

    @property
    def chat_template(self) -> Path | None:
        """Template file: the one of the chats trained on, else the start's, if it is a file."""
        folders = (self.given, self.data, self.tokenizer, self.start)
        files = [folder / CHAT_TEMPLATE for folder in folders if folder]
        return next((file for file in files if file.is_file()), None)

    def tokens(self) -> dict[str, Any]:
        """Return the special tokens' ids as the start's config.json has them; eos may be a list."""
        config = _read(self.start, "config.json")
        return {key: config[key] for key in TOKENS if key in config}

    def generation(self, tokens: dict[str, Any]) -> dict[str, Any]:
        """Return generation_config.json: the start's whole, with the ends of the chats trained on.

        Args:
            tokens: Special tokens' ids, where the start has no generation config.
        """
        told = _read(self.start, GENERATION)
        own = told or {key: value for key, value in tokens.items() if value is not None}
        ends = list_of(own.get("eos_token_id", tokens.get("eos_token_id")))
        told_by = [_read(folder, GENERATION) for folder in (self.data, self.given)]
        chats = [end for each in told_by for end in list_of(each.get("eos_token_id"))]
        if broken := next((end for end in [*ends, *chats] if type(end) is not int), None):
            raise ValueError(f"{GENERATION} beside the model: eos_token_id {broken!r} is no id")
        if new := [end for end in chats if end not in ends]:
            # without a start's, sorted: no order means anything
            ends = [*ends, *new] if told else sorted([*ends, *new])
            return {**own, "eos_token_id": ends if len(ends) > 1 else ends[0]}
        return {"eos_token_id": None, **own}

    def write(self, folder: Path, tokenizer: bool = True) -> None:
        """Copy the tokenizer, unless told not to, and the chat template into a folder."""
        if tokenizer and (found := self.given or self.tokenizer):
            copy_tokenizer(found, folder)
        if template := self.chat_template:
            manifest.check_listed(template.parent, [CHAT_TEMPLATE])
            shutil.copyfile(template, folder / CHAT_TEMPLATE)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files, compared with their hashes where a manifest lists them.

    Raises:
        ValueError: The source has none, or one is altered.
    """
    more = sorted(f for f in (source / MORE_TEMPLATES).glob("*") if f.is_file())
    names = [*TOKENIZER_FILES, *(f"{MORE_TEMPLATES}/{file.name}" for file in more)]
    found = [name for name in names if (source / name).is_file()]
    if not found:
        raise ValueError(f"{source} holds none of {', '.join(TOKENIZER_FILES)}")
    manifest.check_listed(source, names)
    for name in found:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def keep(companions: Companions, tokens: dict[str, Any], run: Path) -> None:
    """Copy a start's companions into a run folder, sealed, so that the run is whole by itself."""
    with manifest.sealed_copy(run / START) as folder:
        companions.write(folder)
        for name, content in (
            (GENERATION, companions.generation(tokens)),
            ("config.json", tokens),
        ):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def keep_tokenizer(source: Path, run: Path) -> None:
    """Copy the tokenizer of a run's data into its folder, sealed.

    Args:
        source: The tokenizer's folder, whose files have been compared with their hashes.
        run: The run folder.
    """
    with manifest.sealed_copy(run / TOKENIZER) as folder:
        without = shutil.ignore_patterns(manifest.NAME)
        shutil.copytree(source, folder, ignore=without, dirs_exist_ok=True)


def list_of(ids: int | Sequence[int] | None) -> list[int]:
    """Return token ids that a config gives as one number, several or none."""
    return [] if ids is None else list(ids) if isinstance(ids, list | tuple) else [cast(int, ids)]


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _read(folder: Path | None, name: str) -> dict[str, Any]:
    file = folder and folder / name
    return read_object(file) if file and file.is_file() else {}
