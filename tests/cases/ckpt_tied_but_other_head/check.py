from pathlib import Path

from cases.against_transformers import same_logits, with_weights
from torch import Tensor


def other_head(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"] = 0.01 - weights["model.embed_tokens.weight"]


def check(case: Path, work: Path) -> None:
    same_logits(with_weights(case, work, other_head), "lm_head")
