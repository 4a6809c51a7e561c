"""tokenizer_config.json: which tokens begin and end a document, and whether BOS does."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

AddBos = Literal["auto"] | bool
"""Whether texts begin with BOS; auto: as `transformers` has it of the tokenizer's files."""
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
"""Config for transformers of a tokenizer.json that came without one."""
LLAMA = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
}
"""Config for transformers of a tokenizer.model that came without one."""


def named(folder: Path, role: str) -> str | None:
    """Return the token that the folder's config names as `bos` or `eos`, if it does."""
    return _content(read_config(folder).get(f"{role}_token"))


def unnamed(folder: Path, role: str) -> ValueError:
    """Error of a folder that does not say its BOS or EOS."""
    return ValueError(f"{folder} names no {role.upper()} token; pass --{role} TOKEN")


class BosRule(NamedTuple):
    """Whether texts begin with BOS."""

    added: bool
    why: str
    """What decides it, for reports."""


def told_bos_rule(bos: str | None, add_bos: AddBos) -> BosRule | None:
    """Return what the user says; None if that is left to the tokenizer's files."""
    if add_bos != "auto":
        return BosRule(add_bos, f"--add_bos {str(add_bos).lower()}")
    return None if bos is None else BosRule(True, "--bos")


def bos_rule_of_model(folder: Path) -> BosRule:
    """Say whether a tokenizer.model begins texts with BOS, by the config beside it."""
    added = read_config(folder).get("add_bos_token")
    if added is None:
        return BosRule(True, "LlamaTokenizer's default")
    return BosRule(bool(added), "add_bos_token in tokenizer_config.json")


def source_of(role: str, token: str | None, folder: Path) -> str:
    """Say who named the token of a role, for reports."""
    if token is not None:
        return f"--{role}"
    return "tokenizer_config.json" if named(folder, role) else "the tokenizer's file"


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's tokenizer_config.json, {} if there is none; ValueError if it is broken."""
    file = folder / "tokenizer_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no JSON object")
    return config


def save_config(
    folder: Path, config: dict[str, Any], bos: str, eos: str, add_bos: bool | None = None
) -> None:
    """Write the tokenizer_config.json that transformers needs, naming BOS and EOS.

    `add_bos` is read of a tokenizer.model, and by transformers 4 of some classes.
    """
    config = dict(config)
    if add_bos is not None:
        config["add_bos_token"] = add_bos
    for role, token in (("bos_token", bos), ("eos_token", eos)):
        if _content(config.get(role)) != token:
            config[role] = token
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _content(token: str | dict[str, Any] | None) -> str | None:
    """Text of a special token, which a config may hold with its settings."""
    return token.get("content") if isinstance(token, dict) else token
