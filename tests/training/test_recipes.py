"""The recipes of 2025 and 2026, at toy size: three steps, their layers, an export."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from training import runs

from lit_longctx.checkpoint import open_checkpoint
from lit_longctx.training.hardware import SHAPES

CONFIG = Path(__file__).parents[2] / "config"
TINY = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "bos_token_id": 256,
    "eos_token_id": 257, "max_position_embeddings": 64,
}  # fmt: skip
LAYERS = {
    "smollm3_64k": ["RoPE", "RoPE", "RoPE", "NoPE", "RoPE", "RoPE"],
    "olmo3_64k": ["RoPE", "RoPE", "RoPE", "YaRN", "RoPE", "RoPE"],
    "drope": ["NoPE"] * 6,
    "qwen25_1m": ["RoPE"] * 6,
    "ultralong_1m": ["YaRN"] * 6,
    "longrope2_128k": ["LongRoPE"] * 6,
    "gemma3_128k": ["RoPE"] * 5 + ["PositionInterpolation"],
}
"""Schemes of the first six layers, as the papers have them."""
THETAS = {"smollm3_64k": 5e6, "qwen25_1m": 1e7}
"""Rotary base at the end."""


def shrunk(value: Any) -> Any:
    """A position, or a pattern, for heads of 16 features and texts of some hundred tokens."""
    small: dict[str, Any] = {
        "original_context": lambda _: 64,
        "window": lambda _: 48,
        "long_factor": lambda factors: factors[:8],
    }
    if isinstance(value, dict):
        return {k: small[k](v) if k in small else shrunk(v) for k, v in value.items()}
    return value


def toy(name: str) -> dict[str, Any]:
    """A recipe with a tiny model of its family, tiny data, and windows 256 and 512."""
    content = yaml.safe_load((CONFIG / f"{name}.yaml").read_text())
    shape = SHAPES[content.pop("plan")["shape"]]
    model, data = content["model"]["init_args"], content["data"]["init_args"]
    del model["checkpoint"]
    family = vars(shape).items() - vars(SHAPES["llama2-7b"]).items()
    sizes = {"num_attention_heads", "rms_norm_eps", *TINY}
    model["config"] = {**{k: v for k, v in family if k not in sizes}, **TINY}
    model["position"] = shrunk(model["position"])
    model |= {"compute_dtype": "float32", "mlp_tile_tokens": None}
    model["schedule"]["init_args"]["warmup_steps"] = 0
    longest = data["window"]

    def window(tokens: int) -> int:
        return max(256, 512 * tokens // longest)

    sources = runs.sources()
    ours = dict(zip(data["sources"], [*sources.values()] * 3, strict=False))
    data["sources"] = {
        key: {"folder": part["folder"], "weight": data["sources"][key].get("weight")}
        for key, part in ours.items()
    }
    data |= {"window": 512, "batch_tokens": 2048, "micro_batch_size": 1, "num_workers": 0}
    for stage in data.get("stages", []):
        stage |= {"steps": 1, "window": window(stage.get("window", longest)), "batch_tokens": 2048}
    steps = max(3, len(data.get("stages", [])))
    if stages := data.get("stages"):
        stages[-1]["steps"] += steps - len(stages)
    content["trainer"] = {"accelerator": "cpu", "max_steps": steps, "val_check_interval": steps}
    return content


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_recipe_trains_and_exports_at_toy_size(name: str, tmp_path: Path):
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(toy(name)))
    place = ["--trainer.default_root_dir", tmp_path / "run"]
    ran = runs.run("fit", "--config", tmp_path / "toy.yaml", *place, folder=tmp_path / "run")
    ran.succeeded()
    losses = [loss for _, loss in runs.scalars(tmp_path / "run")["train/loss"]]
    assert len(losses) >= 3
    assert all(0 < loss < 7 for loss in losses)
    opened = open_checkpoint(tmp_path / "run")
    schemes = [opened.layers.position_of(i) for i in range(6)]
    assert [type(scheme).__name__ for scheme in schemes] == LAYERS[name]
    if name in THETAS:
        assert vars(schemes[0])["theta"] == THETAS[name]
    # the export compares what it wrote with what transformers makes of it
    exported = ("--checkpoint", tmp_path / "run", "--output", tmp_path / "hf")
    runs.run("export", *exported).succeeded()
    read = open_checkpoint(tmp_path / "hf").layers.by_layer
    assert [(type(kind.position).__name__, kind.window) for kind in read] == [
        (type(kind.position).__name__, kind.window) for kind in opened.layers.by_layer
    ]
