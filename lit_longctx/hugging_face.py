"""config.json ↔ LlamaConfig and position scheme: what Hugging Face can say of a Llama, and what not."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import PositionScheme, RoPE


def read_config(folder: Path) -> tuple[LlamaConfig, PositionScheme]:
    """Read config.json; refuses by name whatever would make another model of it than it is."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'} is no JSON: {error}") from None
    expected = {"model_type": "llama", "hidden_act": "silu", "mlp_bias": False}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f"{folder}/config.json: {key} is {config[key]!r}, expected {value!r}")
    known = {f.name for f in fields(LlamaConfig)}
    given = {k: v for k, v in config.items() if k in known and v is not None}
    for key in ("bos_token_id", "eos_token_id"):
        if isinstance(given.get(key), list):  # Llama 3.1 lists several ends; the first is the text's
            given[key] = given[key][0]
    try:
        return LlamaConfig(**given), read_position(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}/config.json: {error}") from None


def read_position(config: dict[str, Any]) -> PositionScheme:
    """Return the scheme that config.json describes, in transformers' v5 or v4 form."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    unknown = set(rope) - {"rope_theta", "rope_type", "type"}
    if kind != "default" or unknown:
        names = sorted(unknown - {"factor"}) if kind == "default" else [kind]
        raise ValueError(f"rope {', '.join(names)} cannot be represented; expected rope_type default")
    return RoPE(theta=float(theta))


def config_json(llama: Llama, context: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json with both the v5 (`rope_parameters`) and the v4 rope keys."""
    if not isinstance(llama.position, RoPE):
        raise ValueError(
            f"Hugging Face's Llama cannot represent {type(llama.position).__name__}; "
            "keep the run folder and evaluate it with lit_longctx, or train with RoPE"
        )
    name = str(dtype).removeprefix("torch.")
    theta = float(llama.position.theta)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(llama.config),
        "max_position_embeddings": context or llama.config.max_position_embeddings,
        "hidden_act": "silu",
        "mlp_bias": False,
        "initializer_range": 0.02,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rope_theta": theta,
        "rope_scaling": None,
        "dtype": name,
        "torch_dtype": name,
    }
