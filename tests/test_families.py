"""Every family × every shape: transformers' folder → ours → a step of training → transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from differences import assert_near
from torch import Tensor

from lit_longctx.batch import pack
from lit_longctx.checkpoint import export_pretrained, load_pretrained, open_checkpoint
from lit_longctx.checkpoint.families import FAMILIES
from lit_longctx.decoding import decode, reading
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.layers import LayerKind, Layers
from lit_longctx.position import NoPE, PositionInterpolation, RoPE, YaRN

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "head_dim": {"head_dim": 20},
    "eps": {"rms_norm_eps": 1e-3},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 5}
OWN_SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"bias": {"attention_bias": True}},
    "mistral": {"window": {"sliding_window": 5}, "no window": {"sliding_window": None}},
    "qwen2": {
        "windows above": {**SLIDING, "max_window_layers": 2},
        "layer_types": {
            **SLIDING,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "yarn": {"rope_parameters": YARN},
    },
    "qwen3": {
        "windows above": {**SLIDING, "max_window_layers": 1},
        "bias": {"attention_bias": True},
    },
    "smollm3": {
        "interval": {"no_rope_layer_interval": 2},
        "list": {"no_rope_layers": [0, 1, 1, 0], "rope_parameters": PLAIN},
        "no rope at all": {"no_rope_layers": [0] * 4},
        "windows": SLIDING,
        "bias": {"attention_bias": True},
    },
    "olmo2": {"bias": {"attention_bias": True}, "yarn": {"rope_parameters": YARN}},
    "olmo3": {
        "window": {"sliding_window": 5},
        "yarn in full layers": {
            "sliding_window": 5,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN},
        },
    },
    "gemma3_text": {
        "window": {"sliding_window": 5, "query_pre_attn_scalar": 30},
        "linear in full layers": {
            "sliding_window": 5,
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    },
}
CASES = [
    pytest.param(family, shape, given, id=f"{family}, {shape}")
    for family, own in OWN_SHAPES.items()
    for shape, given in {**SHAPES, **own}.items()
]


def tokens(length: int) -> Tensor:
    return torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(length))


def random_model(family: str, folder: Path, **given: Any) -> Any:
    """Save a model of transformers' own class with random weights."""
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **given})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    model.save_pretrained(folder)
    return model


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(("family", "shape", "given"), CASES)
def test_logits_are_those_of_transformers(
    family: str, shape: str, given: dict[str, Any], tmp_path: Path
):
    expected = random_model(family, tmp_path / "theirs", **given)
    ours = load_pretrained(tmp_path / "theirs")
    for length in (9, 70):
        with torch.no_grad():
            found = ours.logits(reading(tokens(length)))
            assert_near(
                f"{family}, {shape}: read", found, expected(tokens(length)).logits, atol=1e-5
            )
    loss, _ = ours.loss(pack(tokens(21), bos=1))
    loss.backward()
    with torch.no_grad():
        for parameter in ours.parameters():
            assert parameter.grad is not None
            parameter -= 1e-3 * parameter.grad
    export_pretrained(ours, tmp_path / "ours", context=256)
    again = theirs(tmp_path / "ours")
    assert type(again) is type(expected)
    with torch.no_grad():
        found = ours.logits(reading(tokens(70)))
        assert_near(
            f"{family}, {shape}: trained, exported", again(tokens(70)).logits, found, atol=1e-5
        )
    before, after = (open_checkpoint(tmp_path / name) for name in ("theirs", "ours"))
    assert (before.layers, before.tokens) == (after.layers, after.tokens)
    unlike = {"max_position_embeddings": 256, "head_dim": before.config.head_dim}
    assert vars(before.config) | unlike == vars(after.config)
