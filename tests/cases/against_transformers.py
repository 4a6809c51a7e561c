"""What transformers makes of a model folder, beside what we make of it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lit_longctx.checkpoint import load_pretrained
from lit_longctx.checkpoint.hugging_face import read_config
from lit_longctx.decoding import reading
from lit_longctx.position import Rotary

T = TypeVar("T")


def same_positions(folder: Path, *refused: str) -> None:
    """Compare frequencies and attention factor; a refusal that names one of `refused` will do."""
    found, refusal = tried(lambda: read_config(folder))
    if found is None:
        assert any(name in refusal for name in refused), refusal
        return
    config, layers = found
    position = layers.position
    assert isinstance(position, Rotary)
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(folder))
    torch.testing.assert_close(
        position.frequencies(config.head_width), theirs.inv_freq.float(), rtol=1e-5, atol=0
    )
    assert abs(position.attention_scaling - theirs.attention_scaling) < 1e-6


@torch.no_grad()
def same_logits(folder: Path, *refused: str) -> None:
    """Compare the logits of 60 tokens; a refusal that names one of `refused` will do."""
    llama, refusal = tried(lambda: load_pretrained(folder))
    if llama is None:
        assert any(name in refusal for name in refused), refusal
        return
    ids = torch.arange(3, 63)[None]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(llama.logits(reading(ids)), theirs(ids).logits, rtol=0, atol=1e-4)


def refused(call: Callable[[], Any]) -> str:
    """Return the message of the ValueError that this raises."""
    found, refusal = tried(call)
    assert refusal, f"passes without a word: {found}"
    return refusal


def tried(call: Callable[[], T]) -> tuple[T | None, str]:
    """Return what a call returns, or None and why it refuses, with the names of files alone.

    A case's folder is named after what it tests: its path would pass for a reason.
    """
    try:
        return call(), ""
    except ValueError as error:
        return None, re.sub(r"\S*/cases/\w+/?|\S*/", "", str(error))


def with_weights(
    folder: Path, copy: Path, change: Callable[[dict[str, Tensor]], Any] = lambda weights: None
) -> Path:
    """Copy a model folder and add random weights of its config's shape, changed as told."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("README", "*.py", "__pycache__"))
    config = json.loads((copy / "config.json").read_text())
    width, inner, vocab = (config[n] for n in ("hidden_size", "intermediate_size", "vocab_size"))
    kv_width = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens": (vocab, width), "lm_head": (vocab, width)}
    for layer in range(config["num_hidden_layers"]):
        attention, mlp = (f"model.layers.{layer}.{part}" for part in ("self_attn", "mlp"))
        shapes |= {f"{attention}.{n}_proj": (width, width) for n in "qo"}
        shapes |= {f"{attention}.{n}_proj": (kv_width, width) for n in "kv"}
        shapes |= {f"{mlp}.{n}_proj": (inner, width) for n in ("gate", "up")}
        shapes[f"{mlp}.down_proj"] = (width, inner)
        shapes[f"model.layers.{layer}.input_layernorm"] = (width,)
        shapes[f"model.layers.{layer}.post_attention_layernorm"] = (width,)
    shapes["model.norm"] = (width,)
    weights = {
        f"{name}.weight": torch.randn(shape) * 0.1 if len(shape) > 1 else torch.ones(shape)
        for name, shape in shapes.items()
    }
    change(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy
