"""config.json ↔ LlamaConfig and position scheme: what Hugging Face can say of a Llama."""

from dataclasses import asdict, fields
from importlib.util import find_spec
from math import isclose
from pathlib import Path
from typing import Any

import torch

from lit_longctx.checkpoint.rope_config import read_position, rope_keys
from lit_longctx.json_file import error_text, read_object
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import PositionScheme, Rotary
from lit_longctx.position.scheme import KEEP_THE_RUN

# ---- in


def read_config(folder: Path) -> tuple[LlamaConfig, PositionScheme]:
    """Read config.json; refuses by name whatever would make another model of it than it is."""
    config = read_object(folder / "config.json")
    expected = {"model_type": "llama", "hidden_act": "silu", "mlp_bias": False}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f"{folder}/config.json: {key} is {config[key]!r}, expected {value!r}")
    known = {f.name for f in fields(LlamaConfig)}
    given = {k: v for k, v in config.items() if k in known and v is not None}
    for key in ("bos_token_id", "eos_token_id"):
        if isinstance(given.get(key), list):  # Llama 3.1 has several ends; the text's is the first
            given[key] = next(iter(given[key]), None)
    try:
        shape, position = LlamaConfig(**given), read_position(config)
        position.check(shape.head_width)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{folder}/config.json: {error_text(error)}") from None
    return shape, position


# ---- out


def config_json(llama: Llama, context: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return config.json, with the rope keys of transformers 4 and 5."""
    if not llama.layers.are_uniform:
        raise ValueError(
            f"Hugging Face's Llama cannot represent layers that differ: {llama.layers}; "
            f"{KEEP_THE_RUN}"
        )
    rope = rope_keys(llama.position, llama.config.head_width, context)
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(llama.config),
        **rope,
        "hidden_act": "silu",
        "mlp_bias": False,
        "initializer_range": 0.02,
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
    same = isclose(theirs.attention_scaling, llama.position.attention_factor)
    for length in (1, 4 * config.max_position_embeddings):  # some schemes differ for long documents
        theirs(torch.zeros(1), torch.tensor([[length - 1]]))
        ours = llama.position.frequencies(llama.config.head_width, length)
        same &= torch.allclose(theirs.inv_freq.float(), ours, rtol=1e-6, atol=0)
    if not same:
        raise ValueError(
            f"transformers reads other positions from the exported folder than {llama.position}; "
            "this is a bug here or there; nothing was written"
        )
