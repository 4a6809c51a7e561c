"""What was measured, a line at a time: an evaluation that was stopped goes on where it was."""

import json
import os
from pathlib import Path
from typing import Any

from lit_longctx import manifest
from lit_longctx.evaluation.measure import Unit, digest

NAME = "measurements.jsonl"


def identity(folder: Path) -> str:
    """Short hash of what a folder holds: of its manifest, or of its files' sizes and times."""
    if (folder / manifest.NAME).is_file():
        return digest(manifest.read(folder))
    files = [(path, path.stat()) for path in manifest.files_of(folder)]
    return digest([(str(p.relative_to(folder)), s.st_size, s.st_mtime_ns) for p, s in files])


class Measurements:
    """Values by what decides them: checkpoint, data, settings and unit; appended to a file.

    What was decided by anything else is not found, and measured anew. A line torn by a stop is
    dropped.

    Args:
        folder: Where the file lies; made when the first value comes.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.values: dict[str, Any] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                entry = json.loads(line)
                self.values[_key(entry["of"])] = entry["value"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{self.path} is altered: line {number} is no measurement; remove that line"
                ) from None

    def __contains__(self, of: Unit) -> bool:
        """Whether this was measured."""
        return _key(of) in self.values

    def __getitem__(self, of: Unit) -> Any:
        """Return what was measured."""
        return self.values[_key(of)]

    def add(self, of: Unit, value: Any) -> None:
        """Keep a value; it is on its way to the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"of": of, "value": value}, allow_nan=False) + "\n")
        self.values[_key(of)] = value


def _key(of: Unit) -> str:
    return json.dumps(of, sort_keys=True)
