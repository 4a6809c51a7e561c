"""How far our numbers are from their references; `pytest --differences` prints what was found."""

from torch import Tensor, testing

LARGEST: dict[str, tuple[int, float, str]] = {}
"""What was compared → how often, the largest difference, how that is measured."""


def assert_near(
    what: str, found: Tensor, expected: Tensor, *, atol: float = 0.0, rtol: float = 0.0
) -> None:
    """Compare as torch does, and remember the largest difference; relative without atol."""
    testing.assert_close(found, expected, atol=atol, rtol=rtol)
    difference = (found.double() - expected.double()).abs()
    if not atol:
        difference = (difference / expected.double().abs()).nan_to_num(0.0)
    times, before, _ = LARGEST.get(what, (0, 0.0, ""))
    unit = "absolute" if atol else "relative"
    LARGEST[what] = times + 1, max(before, difference.max().item()), unit


def table() -> str:
    """What was compared, as Markdown."""
    rows = [f"| {what} | {n} | {most:.1e} {unit} |" for what, (n, most, unit) in LARGEST.items()]
    return "\n".join(["| what | comparisons | largest difference |", "| --- | --- | --- |", *rows])
