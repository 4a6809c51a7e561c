"""GGUF files as llama.cpp's converter writes them, made from models of transformers."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "ĠĠ ĠĠ", "t h", "th e", "Ġ t"]
TOKENS = [*SPECIALS, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def llama(tied: bool = True, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """A small Llama of random weights."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": len(TOKENS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    }
    found = LlamaForCausalLM(LlamaConfig(**config | settings, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in found.parameters():  # their deviation of 0.02 would hide mistakes
            parameter.normal_(std=0.1).add_(1 if parameter.ndim == 1 else 0)
    return found.eval()


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as llama.cpp's convert_hf_to_gguf.py lays them out."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path,
    model: LlamaForCausalLM,
    kind: str = "llama",
    pre: str = "smollm",
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    quantized: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """Write a model, with a tokenizer of bytes and a few merges.

    Args:
        path: File to write.
        model: The model.
        kind: general.architecture.
        pre: tokenizer.ggml.pre.
        keys: More metadata.
        tensors: More tensors.
        quantized: How matrices are stored; default: float32.
    """
    config: Any = model.config
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in (keys or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        add[type(value)](key, value)
    add_tokenizer(writer, pre)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        stem = name.removesuffix(".weight")
        if stem in TOP:
            found = TOP[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            found = f"blk.{layer}.{NAMES[part]}"
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            if NAMES[part] in heads:
                weight = permuted(weight, heads[NAMES[part]])
        if quantized is not None and weight.ndim == 2:
            stored = gguf.quantize(weight, quantized)
            writer.add_tensor(f"{found}.weight", stored, raw_dtype=quantized)
        else:
            writer.add_tensor(f"{found}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    """Add SmolLM's kind of tokenizer: byte-level BPE without BOS."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
