"""Figures that tests found, for the table that `make reliability` prints."""

FOUND: list[str] = []
"""Of the test that is running; conftest.py empties it."""


def figure(text: str) -> None:
    """Take down what a test measured."""
    FOUND.append(text)
    print(text)
