"""`lit_longctx import`: a GGUF file of a Llama (llama.cpp's format) → a Hugging Face folder.

Quantized weights are dequantized, so that the model can be trained: exact values of a coarse grid.
What the file says of the model is honoured or refused by name; transformers' own reader passes over
tensors and rope keys that it does not know.
"""

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lit_longctx.checkpoint import meta
from lit_longctx.checkpoint.export import export_pretrained
from lit_longctx.checkpoint.rope_config import read_position
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import Llama3, PositionScheme, RoPE

KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
}
"""Keys below `llama.`, and what they are called in config.json."""
ROPE_KEYS = {
    "rope.freq_base": "rope_theta",
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
}
NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.finetuned": None}
"""Keys beside which the model is still a Llama, if they have this value; None: any."""
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_up": "mlp.up_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of what each rotary frequency is divided by; Llama 3.1's scheme has no other trace."""
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Llama 3 cuts text before byte pairs are merged."""
DIGITS, WORDS = "digits", "words"
PRE_TOKENIZERS = {
    "smollm": DIGITS,
    "llama-bpe": LLAMA3_SPLIT,
    "llama3": LLAMA3_SPLIT,
    "llama-v3": LLAMA3_SPLIT,
    "gpt-2": WORDS,
    "default": WORDS,
}
"""By tokenizer.ggml.pre: GPT-2's words, the same after each digit was cut out, or an expression."""


def import_gguf(
    gguf: str, output: str, dtype: Literal["float32", "bfloat16", "float16"] = "float32"
) -> Path:
    """Convert a GGUF file of a Llama into a Hugging Face folder.

    Memory: the weights in float32. Needs the packages gguf and transformers.

    Args:
        gguf: File with weights (any quantization that the package gguf dequantizes) and tokenizer.
        output: Folder to make; must not exist.
        dtype: Of the stored weights.

    Raises:
        ValueError: The file is no GGUF or no Llama, or holds a tensor, a rope setting or a
            tokenizer that cannot be represented, by name.
    """
    file = GGUF(Path(gguf))
    config = file.config()
    llama = Llama(config, file.position(config))
    fill(llama, file)
    context = config.max_position_embeddings
    export_pretrained(llama, output, GGUFTokenizer(file), context, getattr(torch, dtype))
    kinds = ", ".join(sorted({tensor.tensor_type.name for tensor in file.tensors.values()}))
    weights = sum(parameter.numel() for parameter in llama.parameters())
    print(f"{file.path.name}: {weights:,} weights ({kinds}), {llama.layers}")
    print(f"wrote {output}")
    return Path(output)


class GGUF:
    """A GGUF file's metadata and tensors, read lazily.

    Args:
        path: The file.

    Raises:
        ValueError: It is no GGUF, or of another architecture than llama.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise ValueError(
                f"{path} needs the package gguf; pip install 'lit_longctx[real]'"
            ) from None
        if not path.is_file():
            raise ValueError(f"{path} does not exist; expected a GGUF file")
        try:
            reader = GGUFReader(path)
        except Exception as error:  # the package raises whatever its parsing runs into
            raise ValueError(f"{path} is torn or no GGUF file: {error}") from None
        self.path = path
        self.fields = {key: decimal(field.contents()) for key, field in reader.fields.items()}
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        kind = self.fields.get("general.architecture")
        if kind != "llama":
            raise ValueError(f"{path} is of architecture {kind!r}, expected 'llama'")
        if self.fields.get("split.count", 1) > 1:
            raise ValueError(f"{path} is one of several files; join them with llama-gguf-split")

    def config(self) -> LlamaConfig:
        """Return the model's shape; ValueError names a key that no Llama here has."""
        found: dict[str, Any] = {}
        for key, value in self._llama().items():
            if key in ROPE_KEYS or (key in NEUTRAL and NEUTRAL[key] in (value, None)):
                continue
            if (name := KEYS.get(key)) is None:
                raise ValueError(f"{self.path}: key llama.{key} {value} cannot be represented")
            if found.setdefault(name, value) != value:
                raise ValueError(
                    f"{self.path}: llama.{key} is {value}, but {name} is {found[name]} elsewhere"
                )
        if (embedding := self.tensors.get("token_embd.weight")) is None:
            raise ValueError(f"{self.path} lacks token_embd.weight")
        found["vocab_size"] = int(embedding.shape[1])
        found["tie_word_embeddings"] = "output.weight" not in self.tensors
        for role in ("bos", "eos"):
            found[f"{role}_token_id"] = self.fields.get(f"tokenizer.ggml.{role}_token_id")
        try:
            return LlamaConfig(**{key: value for key, value in found.items() if value is not None})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: {error}") from None

    def position(self, config: LlamaConfig) -> PositionScheme:
        """Return the scheme of rope keys and factors; ValueError names what it cannot be."""
        rope = {ROPE_KEYS[k]: value for k, value in self._llama().items() if k in ROPE_KEYS}
        if rope.get("factor", 1) not in (0, 1):  # llama.cpp's default
            rope.setdefault("rope_type", "linear")
        if rope.get("rope_type") in (None, "none"):
            rope = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10_000.0)}
        context = config.max_position_embeddings
        try:
            scheme = read_position({"max_position_embeddings": context, "rope_parameters": rope})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: {error}") from None
        if ROPE_FACTORS not in self.tensors:
            return scheme
        return self._llama3(scheme, config.head_width)

    def _llama3(self, scheme: PositionScheme, head_dim: int) -> PositionScheme:
        """Return the Llama 3 scheme whose factors the file holds, with Meta's other settings."""
        factors = self.tensor(ROPE_FACTORS).double()
        if isinstance(scheme, RoPE) and scheme.theta is not None:
            if torch.equal(factors, torch.ones_like(factors)):
                return scheme
            found = Llama3(scheme.theta, factor=float(factors.max()), original_context=8192)
            expected = scheme.frequencies(head_dim).double() / factors
            if torch.allclose(found.frequencies(head_dim).double(), expected, rtol=1e-5, atol=0):
                return found
        raise ValueError(
            f"{self.path}: {ROPE_FACTORS} cannot be represented; it is not Llama 3.1's for 8,192 "
            "tokens"
        )

    def tensor(self, name: str) -> Tensor:
        """Return a tensor's values in float32."""
        from gguf import dequantize

        stored = self.tensors[name]
        return torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).float()

    def _llama(self) -> dict[str, Any]:
        """Keys below `llama.`."""
        head = "llama."
        return {k.removeprefix(head): v for k, v in self.fields.items() if k.startswith(head)}


def decimal(value: Any) -> Any:
    """Return a float32 as the decimal that was meant: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


@torch.no_grad()
def fill(llama: Llama, file: GGUF) -> None:
    """Copy a file's weights into a model; ValueError names what is missing or has no place."""
    parameters = dict(llama.named_parameters())
    config = llama.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.kv_heads}
    for stored in file.tensors:
        if stored == ROPE_FACTORS:
            continue
        number, kind = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight|.*", stored).groups()  # pyright: ignore[reportOptionalMemberAccess]
        name = f"model.layers.{number}.{NAMES[kind]}.weight" if kind in NAMES else TOP.get(stored)
        parameter = parameters.pop(name or "", None)
        if parameter is None:
            raise ValueError(f"{file.path} holds {stored}, which this model has no place for")
        weight = file.tensor(stored)
        if weight.shape != parameter.shape:
            got, expected = list(weight.shape), list(parameter.shape)
            raise ValueError(f"{file.path}: {stored} is {got}, expected {expected}")
        # llama.cpp turns neighbouring features, as Meta does
        parameter.copy_(meta.halves(weight, heads[kind]) if kind in heads else weight)
    if parameters:
        raise ValueError(f"{file.path} lacks {next(iter(parameters))} ({len(parameters)} missing)")


class GGUFTokenizer:
    """A GGUF file's tokenizer and chat template, as tokenizer.json and what stands beside it.

    Args:
        file: The file.

    Raises:
        ValueError: transformers is not there, or the text is cut in a way that is not known here.
    """

    def __init__(self, file: GGUF) -> None:
        self.file = file
        kind = file.fields.get("tokenizer.ggml.model")
        self.cut = file.fields.get("tokenizer.ggml.pre", "default")
        if kind not in ("gpt2", "llama"):
            raise ValueError(
                f"{file.path}: tokenizer {kind!r} cannot be read; expected gpt2, llama"
            )
        self.bytes = kind == "gpt2"
        if self.bytes and self.cut not in PRE_TOKENIZERS:
            raise ValueError(
                f"{file.path}: tokenizer.ggml.pre {self.cut!r} is not known; expected one of "
                f"{', '.join(PRE_TOKENIZERS)}"
            )

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ValueError(
                f"{self.file.path} needs the package transformers; pip install 'lit_longctx[hf]'"
            ) from None
        path = self.file.path.resolve()
        with TemporaryDirectory() as alone:  # a neighbour's tokenizer_config.json would be read too
            (Path(alone) / path.name).symlink_to(path)
            options = {"trust_remote_code": False, "local_files_only": True}
            loaded = AutoTokenizer.from_pretrained(alone, gguf_file=path.name, **options)
        found = cast(Any, loaded)
        if self.bytes:
            found.backend_tokenizer.pre_tokenizer = pre_tokenizer(PRE_TOKENIZERS[self.cut])
        found.save_pretrained(folder)


def pre_tokenizer(kind: str) -> Any:
    """Return what cuts text before byte pairs are merged: a value of `PRE_TOKENIZERS`."""
    from tokenizers import Regex, pre_tokenizers

    if kind == WORDS:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == DIGITS:
        first, words = pre_tokenizers.Digits(individual_digits=True), True
    else:
        first, words = pre_tokenizers.Split(Regex(kind), behavior="isolated"), False
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    return pre_tokenizers.Sequence([first, last])
