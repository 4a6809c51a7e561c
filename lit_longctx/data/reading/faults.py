"""What could not be read: skipped and counted, until it is too much."""

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Broken(NamedTuple):
    """Stands where a row would, had it been readable."""

    kind: str


def broken_file(error: BaseException, otherwise: str) -> Broken:
    """Return the system's reason if it refused the file, else that the content is broken."""
    number = getattr(error, "errno", None)
    return Broken(f"unreadable: {os.strerror(number)}" if number else otherwise)


@dataclass
class Faults:
    """What could not be read: counted by kind, with the first of each kind kept for the report."""

    tolerated: float = 0.01
    """Largest share of broken documents; above it the run stops."""
    read: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What was odd, but read: count and first example of each kind."""

    def note(self, kind: str, where: str) -> None:
        """Count something odd that is no fault."""
        found = self.notes.setdefault(kind, {"count": 0, "first": _printable(where[:200])})
        found["count"] += 1

    def add(self, kind: str, where: str) -> None:
        """Count one broken document."""
        self.kinds[kind] += 1
        self.examples.setdefault(kind, _printable(where[:200]))
        if self.read + self.kinds.total() >= 1000:
            self.check()

    def check(self) -> None:
        """Raise ValueError if more than the tolerated share was broken."""
        broken = self.kinds.total()
        seen = self.read + broken
        if broken > self.tolerated * seen:
            kind, count = self.kinds.most_common(1)[0]
            raise ValueError(
                f"{broken} of {seen} documents are broken (tolerated: {self.tolerated:.1%}), most "
                f"often {kind} ({count}, first at {self.examples[kind]}); "
                "mend the input or raise --tolerated"
            )

    def described(self) -> dict[str, Any]:
        """Return the manifest's entry: count and first example of each kind."""
        return {
            kind: {"count": number, "first": self.examples[kind]}
            for kind, number in self.kinds.items()
        }


def _printable(text: str) -> str:
    """Escape what would break a line of the report, or its encoding."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
