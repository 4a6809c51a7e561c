"""Folders that Hugging Face's `Dataset.save_to_disk` writes, without the library."""

import json
from typing import Any

from lit_longctx.data.reading.inputs import File, Selection, files

DESCRIPTIONS = ("dataset_info.json", "state.json", "dataset_dict.json")


def input_files(name: str, selection: Selection) -> list[File]:
    """Return the files of an input that are read, and count them and those that are left."""
    taken = shards(files(name, selection), name)
    selection.take(taken)
    return taken


def shards(files: list[File], name: str) -> list[File]:
    """Return the Arrow files of a saved dataset, in its own order; other inputs' files as they are.

    Args:
        files: All files of the input.
        name: The input, for messages.

    Raises:
        ValueError: The folder holds several splits or further folders, or lacks a file.
    """
    named = {file.name: file for file in files}
    if split := named.get("dataset_dict.json"):
        splits = _described(split, "splits", name)
        example = f"{name.rstrip('/')}/{splits[0] if splits else 'train'}"
        raise ValueError(f"input {name} holds the splits {', '.join(splits)}; name one: {example}")
    if "state.json" in named and "dataset_info.json" in named:
        listed = [
            entry["filename"] for entry in _described(named["state.json"], "_data_files", name)
        ]
        if missing := [file for file in listed if file not in named]:
            raise ValueError(f"input {name} lacks {missing[0]}, which its state.json names")
        return [named[file] for file in listed]
    for file in files:
        below, _, last = file.name.rpartition("/")
        if last == "state.json" and f"{below}/dataset_info.json" in named:
            raise ValueError(f"input {name} holds a saved dataset, {below}; name it by itself")
    return files


def _described(file: File, key: str, name: str) -> list[Any]:
    try:
        with file.open() as stream:
            return list(json.load(stream)[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"input {name}: {file.name} has no list {key!r} ({error})") from None
