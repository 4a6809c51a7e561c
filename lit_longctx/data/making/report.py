"""What became of the documents and questions of a synthesis."""

from collections import Counter
from dataclasses import dataclass, field
from typing import final

ENOUGH = 20
"""Questions after which the share of failures is taken seriously."""


@final
class Unanswered(Exception):
    """A question that came to nothing; its text is one of few reasons.

    Args:
        reason: Counted in the report.
        detail: What else is known; of the first of each kind it is shown.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail


@dataclass
class Report:
    """What became of documents and questions."""

    tolerated: float = 0.1
    """Largest share of questions that may fail; above it the run stops."""
    documents: int = 0
    passed_over: Counter[str] = field(default_factory=Counter)
    """Documents that nothing was asked about, by the reason."""
    kept: int = 0
    filtered: int = 0
    """Questions whose answer the model took back."""
    failed: Counter[str] = field(default_factory=Counter)
    """Questions that came to nothing, by the reason."""
    first: dict[str, str] = field(default_factory=dict)
    """The first question of each reason, and what else is known of it."""
    costs: dict[str, int] = field(default_factory=dict)
    """Replies, requests and tokens."""

    def fail(self, name: str, reason: Unanswered) -> None:
        """Count a failure; ValueError if it is one too many."""
        shown = f"{name}: {reason.detail}" if reason.detail else name
        self.failed[str(reason)] += 1
        self.first.setdefault(str(reason), ascii(shown[:200])[1:-1])
        if self.kept + self.filtered + self.failed.total() >= ENOUGH:
            self.check()

    def check(self) -> None:
        """Raise ValueError if more than the tolerated share has failed."""
        failed = self.failed.total()
        asked = self.kept + self.filtered + failed
        if failed > self.tolerated * asked:
            reason, count = self.failed.most_common(1)[0]
            raise ValueError(
                f"{failed} of {asked} questions failed (tolerated: {self.tolerated:.1%}), most "
                f"often by {reason} ({count}, first {self.first[reason]}); replies are kept: mend "
                "it and start again, or raise --task.tolerated"
            )

    def summary(self) -> str:
        """Return the counts as lines of text."""
        lines = [
            f"{self.documents:,} documents: {self.kept:,} rows kept, {self.filtered:,} filtered by "
            f"critique, {self.failed.total():,} failed"
        ]
        for reason, count in self.passed_over.items():
            lines.append(f"  passed over {count:,}: {reason}")
        for reason, count in self.failed.items():
            lines.append(f"  failed {count:,}: {reason}, first {self.first[reason]}")
        if self.costs:
            lines.append("  " + ", ".join(f"{n:,} {name}" for name, n in self.costs.items()))
        return "\n".join(lines)
