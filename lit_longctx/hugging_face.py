"""config.json ↔ LlamaConfig and position scheme: what Hugging Face can say of a Llama."""

import json
from dataclasses import asdict, fields
from importlib.util import find_spec
from math import isclose
from pathlib import Path
from typing import Any

import torch

from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import (
    DynamicNTK,
    Llama3,
    LongRoPE,
    PositionInterpolation,
    PositionScheme,
    RoPE,
    Rotary,
    YaRN,
)
from lit_longctx.position.scheme import KEEP_THE_RUN

SCHEMES = {
    str(scheme.rope_type): scheme
    for scheme in (RoPE, PositionInterpolation, DynamicNTK, YaRN, Llama3, LongRoPE)
}
"""By Hugging Face's rope_type."""


# ---- in


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
        if isinstance(
            given.get(key), list
        ):  # Llama 3.1 lists several ends; the first is the text's
            given[key] = given[key][0]
    try:
        return LlamaConfig(**given), read_position(config)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}/config.json: {error}") from None


def read_position(config: dict[str, Any]) -> PositionScheme:
    """Return the scheme that config.json describes, in transformers' v5 or v4 form.

    v5 keeps everything in `rope_parameters`; v4 has `rope_scaling` with `rope_type` or `type`, and
    `rope_theta` beside it. A key that no scheme here can represent is refused by name.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = float(rope.pop("rope_theta", config.get("rope_theta") or 10_000.0))
    old_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_kind)
    context = config.get("max_position_embeddings", 2048)
    partial = rope.pop("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (1.0, None):
        raise ValueError(f"rope key partial_rotary_factor {partial} cannot be represented")
    if kind not in SCHEMES:
        raise ValueError(
            f"rope_type {kind!r} cannot be represented; expected one of {', '.join(SCHEMES)}"
        )
    rope["rope_theta"] = theta
    position = SCHEMES[kind].from_rope(rope, context)
    told = rope.pop("attention_factor", None)
    factor = getattr(position, "attention_factor", 1.0)
    if told is not None and not isclose(told, factor, rel_tol=1e-6):
        raise ValueError(
            f"rope key attention_factor {told} cannot be represented; {kind} here has {factor:.6g}"
        )
    if rope.pop("truncate", True) is not True:
        raise ValueError("rope key truncate false cannot be represented")
    if rope:
        raise ValueError(f"rope key {sorted(rope)[0]} cannot be represented with rope_type {kind}")
    return position


# ---- out


def config_json(llama: Llama, context: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json with both the v5 (`rope_parameters`) and the v4 rope keys.

    transformers 4 ignores v5's dictionary, and would silently read theta 10,000 without the others.
    """
    if not llama.layers.are_alike:
        raise ValueError(
            f"Hugging Face's Llama cannot represent layers that differ: {llama.layers}; "
            f"{KEEP_THE_RUN}"
        )
    rope = llama.position.to_rope(llama.config.head_width)
    theta = float(rope.pop("rope_theta"))
    if isinstance(llama.position, DynamicNTK):
        # transformers scales from here: raising it would switch the scaling off
        context = llama.position.known_context
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(llama.config),
        "max_position_embeddings": context,
        "hidden_act": "silu",
        "mlp_bias": False,
        "initializer_range": 0.02,
        "rope_parameters": {**rope, "rope_theta": theta},
        "rope_theta": theta,
        "rope_scaling": rope if rope["rope_type"] != "default" else None,
        "dtype": name,
        "torch_dtype": name,
    }


def compare_with_transformers(folder: Path, llama: Llama) -> None:
    """Reload a folder in transformers, if installed; ValueError if it reads other positions."""
    if not find_spec("transformers"):
        return
    from transformers import LlamaConfig as TheirConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = TheirConfig.from_pretrained(folder, local_files_only=True)
    theirs = LlamaRotaryEmbedding(config)  # pyright: ignore[reportArgumentType]
    assert isinstance(llama.position, Rotary)
    ours = llama.position.frequencies(llama.config.head_width)
    found = theirs.inv_freq.float()
    scale, own_scale = theirs.attention_scaling, llama.position.attention_factor
    if not torch.allclose(found, ours, rtol=1e-6, atol=0) or not isclose(scale, own_scale):
        raise ValueError(
            f"transformers reads other positions from the exported folder than {llama.position}; "
            "this is a bug here or there; nothing was written"
        )
