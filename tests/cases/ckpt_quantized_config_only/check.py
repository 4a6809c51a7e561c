from pathlib import Path

import torch
from cases.against_transformers import refused, with_weights
from torch import Tensor

from lit_longctx.checkpoint import load_pretrained


def as_integers(weights: dict[str, Tensor]) -> None:
    for name in [name for name in weights if "proj.weight" in name]:
        weight = weights[name]
        weights[name] = (weight / weight.abs().max() * 127).round().to(torch.int8)


def check(case: Path, work: Path) -> None:
    folder = with_weights(case, work, as_integers)
    assert "quantization_config" in refused(lambda: load_pretrained(folder))
