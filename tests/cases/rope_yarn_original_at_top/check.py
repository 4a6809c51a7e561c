from pathlib import Path

from cases.against_transformers import same_positions


def check(case: Path, work: Path) -> None:
    same_positions(case, "original_max_position_embeddings")
