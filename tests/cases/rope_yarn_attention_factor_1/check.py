from pathlib import Path

from cases.against_transformers import same_positions


def check(case: Path, work: Path) -> None:
    same_positions(case, "attention_factor")
