"""A tokenizer's chat template: the Jinja text, found beside it, and what it knows."""

from pathlib import Path
from typing import Any

from lit_longctx.checkpoint.companions import CHAT_TEMPLATE
from lit_longctx.data.tokens.libraries import JsonTokenizer, SentencePieceTokenizer
from lit_longctx.data.tokens.special_tokens import named, read_config
from lit_longctx.data.tokens.tokenizer import ByteTokenizer, Tokenizer

PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""A template that any tokenizer can speak, of Zephyr's form."""


def find_template(tokenizer: Tokenizer, template: str | None) -> tuple[str, str]:
    """Return the Jinja text and where it is from; see `ChatTemplate`."""
    if template == "plain" or (template is None and isinstance(tokenizer, ByteTokenizer)):
        return PLAIN, "the plain chat template"
    if template is not None:
        return read_template(Path(template)), template
    folder = folder_of(tokenizer)
    file = folder / CHAT_TEMPLATE
    if file.is_file():
        return read_template(file), str(file)
    found = read_config(folder).get("chat_template")
    if isinstance(found, list):  # several by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    if not isinstance(found, str):
        raise ValueError(
            f"{folder} has no chat template; expected chat_template.jinja or one in "
            "tokenizer_config.json; name a file with one, or 'plain'"
        )
    return found, f"the chat template of {folder}"


def read_template(file: Path) -> str:
    """Return a file's text; ValueError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a Jinja template in {file}; got {one_line(error)}") from None


def folder_of(tokenizer: Tokenizer) -> Path:
    """Return the folder of a tokenizer that has a file."""
    assert isinstance(tokenizer, JsonTokenizer | SentencePieceTokenizer)
    return tokenizer.file.parent


def variables(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what a template knows besides the messages: nothing, and the texts of tokens."""
    known: dict[str, Any] = {"tools": None, "documents": None}
    if not isinstance(tokenizer, ByteTokenizer):
        folder = folder_of(tokenizer)
        for key, value in read_config(folder).items():
            if key.endswith("_token") and isinstance(value, str | dict):
                known[key] = named(folder, key.removesuffix("_token"))
    return known | {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())
