"""JSON files that must hold an object; what is wrong with one is said with its name."""

import json
from pathlib import Path
from typing import Any


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises:
        ValueError: The file is no UTF-8, no JSON, or JSON of another kind.
        OSError: It cannot be read.
    """
    return object_in(file.read_bytes(), file)


def object_in(text: str | bytes, file: Path | str) -> dict[str, Any]:
    """Return the JSON object in the text of a file, which errors name; see `read_object`."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}; copy it again") from None
    if not isinstance(found, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(found), "a number")
        raise ValueError(f"{file} holds {kind}, expected a JSON object; copy it again")
    return found


def error_text(error: Exception) -> str:
    """Return what reading an object of another form than expected raised, in one line."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return " ".join(str(error).split())
