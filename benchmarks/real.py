"""What `make real` found: loss by position before and after, needles, the export in transformers.

    python benchmarks/real.py

From the repository's root, after the other commands of `make real`. Writes real.md and real.png
into runs/real_evaluation.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lit_longctx import plots
from lit_longctx.batch import pack
from lit_longctx.checkpoint import load_pretrained
from lit_longctx.data.store.windows import Windows

START, EXPORT = "checkpoints/smollm2", "exports/real"
BEFORE, AFTER = Path("runs/real_evaluation"), Path("runs/real_evaluation_after")
TOKENS = 1024
"""Tokens on which the export is compared with transformers."""
NEAR = 1e-3
"""Nats by which a token may differ there: float32 on two implementations."""


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def scheme(name: str) -> str:
    """Return a column's name without its folder."""
    return name.removeprefix(START).strip() or "as it is"


def losses() -> tuple[list[int], dict[str, list[float]]]:
    """Return bucket edges, and the loss in each by scheme, the trained one last."""
    before, after = results(BEFORE), results(AFTER)
    trained = type(load_pretrained(EXPORT).position).__name__
    curves = {scheme(name): values for name, values in before["loss"].items()}
    return before["edges"], curves | {f"{trained}, trained": after["loss"][EXPORT]}


def table(edges: list[int], curves: dict[str, list[float]]) -> str:
    """Return losses as Markdown, and the best untrained scheme of the last bucket."""
    heads = [f"{low:,}–{high:,}" for low, high in pairwise(edges)]
    lines = ["| nats per token by tokens before | " + " | ".join(heads) + " |"]
    lines.append("|---" * (len(heads) + 1) + "|")
    for name, values in curves.items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    *untrained, _ = curves
    best = min(untrained, key=lambda name: curves[name][-1])
    return "\n".join([*lines, "", f"least loss at {heads[-1]}, untrained: {best}"])


def needles() -> str:
    """Return the share of needles found, by length."""
    found = results(BEFORE / "needles")
    lengths = found["grid"]["lengths"]
    lines = ["| needles found | " + " | ".join(f"{n:,} tokens" for n in lengths) + " |"]
    lines.append("|---" * (len(lengths) + 1) + "|")
    for name, cells in found["probes"]["needle"].items():
        texts = [f"{sum(map(round, row))} of {len(row)}" for row in cells]
        lines.append(f"| {scheme(name)} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


@torch.no_grad()
def compared_with_transformers() -> str:
    """Open the export in transformers; ValueError if a held-out token's loss is another there."""
    from transformers import AutoModelForCausalLM

    tokens = torch.from_numpy(Windows("data/real", "held_out", 256).read(0, TOKENS + 1))[None]
    theirs = AutoModelForCausalLM.from_pretrained(EXPORT, dtype=torch.float32)
    chances = theirs(tokens[:, :-1]).logits.log_softmax(-1)
    expected = -chances.gather(-1, tokens[:, 1:, None])[..., 0]
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 0] = True
    apart = float((load_pretrained(EXPORT)(pack(tokens, -1, starts)) - expected).abs().max())
    if not apart < NEAR:
        raise ValueError(f"{EXPORT}: transformers differs by {apart} nats; expected < {NEAR}")
    said = f"{theirs.config.rope_parameters}, {theirs.config.max_position_embeddings:,} tokens"
    return f"transformers opens {EXPORT} ({said}): losses differ by at most {apart:.1e} nats"


def main() -> None:
    edges, curves = losses()
    text = "\n\n".join([table(edges, curves), needles(), compared_with_transformers()])
    (BEFORE / "real.md").write_text(text + "\n")
    trained = results(BEFORE)["trained_context"]
    plots.loss_by_position(edges, curves, trained).savefig(BEFORE / "real.png", dpi=150)
    print(text)
    print(f"wrote {BEFORE}/real.md and real.png")


if __name__ == "__main__":
    main()
