"""Meta's own checkpoints (params.json, consolidated.NN.pth) → our names and config.

Their rotary pairs are neighbours (2i, 2i + 1); ours, like Hugging Face's, are halves (i, i + d/2).
The rows of wq and wk are permuted once, on the way in.
"""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from lit_longctx.json_file import error_text, read_object
from lit_longctx.model import LlamaConfig
from lit_longctx.position import Llama3, PositionScheme, RoPE

PARAMS = "params.json"
NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CUT_BY_COLUMN = ("attention.wo", "feed_forward.w2")
"""Weights that model parallelism cuts along their inputs; the others, along their outputs."""


def parts(folder: Path) -> list[dict[str, Tensor]]:
    """Open all consolidated files, memory-mapped; tensors only, nothing else is unpickled."""
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise ValueError(f"{folder} has {PARAMS} but no consolidated.*.pth beside it")
    return [_opened(file) for file in files]


def _opened(file: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, OSError, EOFError, UnpicklingError, ValueError, KeyError) as error:
        line = error_text(error)[:200]
        raise ValueError(f"{file} is torn, or holds more than tensors: {line}") from None
    if not isinstance(found, dict) or not all(isinstance(w, Tensor) for w in found.values()):
        raise ValueError(f"{file} holds no tensors by name; expected Meta's weights")
    return found


def read_params(folder: Path) -> tuple[LlamaConfig, PositionScheme]:
    """Return config and scheme of params.json; widths it leaves open come from the weights."""
    params = read_object(folder / PARAMS)
    weights = parts(folder)
    try:
        return _described(params, weights)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{folder / PARAMS}: {error_text(error)}") from None


def _described(
    params: dict[str, Any], weights: list[dict[str, Tensor]]
) -> tuple[LlamaConfig, PositionScheme]:
    hidden = sum(p["layers.0.feed_forward.w1.weight"].shape[0] for p in weights)
    heads = params["n_heads"]
    theta = float(params.get("rope_theta", 10_000.0))
    llama3 = params.get("vocab_size", -1) > 100_000
    position: PositionScheme = RoPE(theta)
    context = 8192 if llama3 else 4096
    if params.get("use_scaled_rope"):
        factor = params.get("rope_scaling_factor", 8)
        position = Llama3(theta, factor=float(factor), original_context=context)
        context = 131_072
    config = LlamaConfig(
        vocab_size=vocabulary(weights, params["dim"]),
        hidden_size=params["dim"],
        intermediate_size=hidden,
        num_hidden_layers=params["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=params.get("n_kv_heads") or heads,
        rms_norm_eps=params["norm_eps"],
        tie_word_embeddings=not any("output.weight" in p for p in weights),
        max_position_embeddings=context,
        bos_token_id=128_000 if llama3 else 1,
        eos_token_id=128_001 if llama3 else 2,
    )
    return config, position


def vocabulary(weights: list[dict[str, Tensor]], width: int) -> int:
    """Rows of the whole embedding; Llama 3 cuts it by rows, Llama 2 by columns."""
    embeddings = [p["tok_embeddings.weight"] for p in weights]
    whole_rows = embeddings[0].shape[1] == width
    return sum(e.shape[0] for e in embeddings) if whole_rows else embeddings[0].shape[0]


def read_weights(folder: Path, config: LlamaConfig) -> dict[str, Tensor]:
    """Join the parts, rename, permute wq and wk; ValueError names a weight that is not known."""
    weights = parts(folder)
    found: dict[str, Tensor] = {}
    for name in weights[0]:
        if name == "rope.freqs":
            continue
        tensor = _joined(name, [part[name] for part in weights], config)
        if name.endswith("attention.wq.weight"):
            tensor = halves(tensor, config.num_attention_heads)
        elif name.endswith("attention.wk.weight"):
            tensor = halves(tensor, config.kv_heads)
        found[_renamed(name, folder)] = tensor
    return found


def _joined(name: str, pieces: list[Tensor], config: LlamaConfig) -> Tensor:
    if len(pieces) == 1 or "norm" in name:
        return pieces[0]
    by_column = any(cut in name for cut in CUT_BY_COLUMN)
    if name == "tok_embeddings.weight":
        by_column = pieces[0].shape[1] != config.hidden_size
    return torch.cat(pieces, dim=1 if by_column else 0)


def _renamed(name: str, folder: Path) -> str:
    if name in TOP:
        return TOP[name]
    _, number, rest = name.split(".", 2) if name.startswith("layers.") else ("", "", "")
    kind = rest.removesuffix(".weight")
    if kind not in NAMES:
        raise ValueError(f"{folder} holds {name}, which this model has no place for")
    return f"model.layers.{number}.{NAMES[kind]}.weight"


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from neighbouring pairs to half-split ones."""
    return rearrange(weight, "(head pair two) width -> (head two pair) width", head=heads, two=2)
