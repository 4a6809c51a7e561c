"""What `prepare` makes of a case's files: text of each split, answers, and what it says."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.sampling.conversations import Conversations
from lit_longctx.data.store.windows import Windows
from lit_longctx.data.tokens.tokenizer import ByteTokenizer


class Prepared(NamedTuple):
    """What came of it."""

    train: str
    """Text to train on, all of it."""
    answers: str
    """What the assistant says, in conversations."""
    documents: int
    """How many there are to train on."""
    refused: dict[str, int]
    """Rows by the reason why they were left out."""
    printed: str


def prepared(files: Path, output: Path, **options: Any) -> Prepared:
    """Prepare bytes of all documents, however many of the rows are refused."""
    options = {"held_out": 0.0, "chunk_tokens": 4096, "tolerated": 1.0, **options}
    manifest, printed = printing(lambda: prepare([str(files)], str(output), **options))
    coder = ByteTokenizer()
    if options.get("chat"):
        pairs = list(iterated(Conversations(str(output), "train", 4096)))
        ids, marks = (np.concatenate(each) for each in zip(*pairs, strict=True))
        text, answers = coder.decode(ids.tolist()), coder.decode(ids[marks].tolist())
    else:
        windows = Windows(str(output), "train", 256)
        text, answers = coder.decode(windows.read(0, windows.tokens).tolist()), ""
    refused = {reason: found["count"] for reason, found in manifest["broken"].items()}
    return Prepared(text, answers, manifest["splits"]["train"]["documents"], refused, printed)


def iterated(conversations: Conversations) -> Any:
    return (conversations[i] for i in range(len(conversations)))


def printing(call: Callable[[], Any]) -> tuple[Any, str]:
    """Return what a call returns, and what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        found = call()
    return found, out.getvalue()


def documents(folder: Path, name: str, weather: str) -> Path:
    """Write 60 documents of 6 to 15 like sentences as jsonl."""
    sentence = f"The {weather} filled the barrel behind the shed before noon."
    rows = [
        {"id": f"d{i}", "text": f"{name} {i}. " + " ".join([sentence] * (6 + i % 10))}
        for i in range(60)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
