from pathlib import Path

import torch
from cases.against_transformers import same_logits, with_weights
from torch import Tensor


def twice(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(8)


def check(case: Path, work: Path) -> None:
    same_logits(with_weights(case, work, twice))
