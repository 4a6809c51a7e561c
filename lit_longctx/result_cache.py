"""Values that are dear to get: kept a line at a time, so that work that was stopped goes on."""

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

CacheKey = dict[str, Any]
"""All that decides a value; JSON can say it."""


class ResultCache:
    """Values by what decides them, a line of a file each, on the disk before they are used.

    What anything else decides is not found, and got anew. A line torn by a stop is dropped; one
    that is not as it was written, by its hash, is refused. One process at a time. Costs an fsync
    per value.

    Args:
        path: The file; made with its folder if it is not there.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.values: dict[str, Any] = {}
        self.file = path.open("a+b", buffering=0)
        try:
            self._lock()
            self._read()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> "ResultCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path} is in use by another run; wait for it or choose another output"
            ) from None

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        self.file.truncate(whole)
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                key, value = _read(line)
                self.values[_key(key)] = value
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(
                    f"{self.path} is altered: line {number} holds no value, or not the one that "
                    "was written; remove that line"
                ) from None

    def __contains__(self, key: CacheKey) -> bool:
        """Whether the value is here."""
        return _key(key) in self.values

    def __getitem__(self, key: CacheKey) -> Any:
        """Return the value."""
        return self.values[_key(key)]

    def add(self, key: CacheKey, value: Any) -> None:
        """Keep a value; it is on the disk when this returns."""
        line = json.dumps({"of": key, "value": value}, allow_nan=False).encode()
        line = _sealed(line) + b"\n"
        end = self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(line) < len(line):
                raise OSError(f"{self.path} cannot grow; make room on its disk and start again")
            os.fsync(self.file.fileno())
        except OSError:
            self.file.truncate(end)  # else the next value would stand behind half a line
            raise
        self.values[_key(key)] = value


HASH = b', "sha256": "'
"""Stands in a line between an object and the hash of what is before it."""


def _sealed(line: bytes) -> bytes:
    """Add to a JSON object, as its last entry, the hash of the text before that."""
    begun = line.removesuffix(b"}")
    return begun + HASH + hashlib.sha256(begun).hexdigest()[:16].encode() + b'"}'


def _read(line: bytes) -> tuple[CacheKey, Any]:
    """Return what decides a line's value, and the value; older versions wrote no hash."""
    entry: dict[str, Any] = json.loads(line)
    if entry.keys() != {"of", "value"} and line != _sealed(line.rpartition(HASH)[0] + b"}"):
        raise ValueError("altered")
    return entry["of"], entry["value"]


def _key(key: CacheKey) -> str:
    return json.dumps(key, sort_keys=True)
