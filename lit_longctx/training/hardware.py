"""Shapes of well-known models and what GPUs hold and do: what a plan starts from."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_longctx.model import LlamaConfig
from lit_longctx.training.flops import DENSE_BF16_PEAKS, peak_flops

GIB = 2**30

SHAPES: dict[str, LlamaConfig] = {
    "llama2-7b": LlamaConfig(32_000, 4096, 11_008, 32, 32, max_position_embeddings=4096),
    "llama2-13b": LlamaConfig(32_000, 5120, 13_824, 40, 40, max_position_embeddings=4096),
    "llama3-8b": LlamaConfig(128_256, 4096, 14_336, 32, 32, 8, max_position_embeddings=8192),
    "llama3.2-1b": LlamaConfig(
        128_256, 2048, 8192, 16, 32, 8, 64, tie_word_embeddings=True, max_position_embeddings=131072
    ),
    "smollm-360m": LlamaConfig(49_152, 960, 2560, 32, 15, 5, tie_word_embeddings=True),
    "smollm2-135m": LlamaConfig(
        49_152, 576, 1536, 30, 9, 3, tie_word_embeddings=True, max_position_embeddings=8192
    ),
    "smollm3-3b": LlamaConfig(
        128_256,
        2048,
        11_008,
        36,
        16,
        4,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        model_type="smollm3",
    ),
    "olmo3-7b": LlamaConfig(
        100_278,
        4096,
        11_008,
        32,
        32,
        max_position_embeddings=8192,
        model_type="olmo3",
        qk_norm="width",
        norm_placement="after",
    ),
    "qwen2.5-7b": LlamaConfig(
        152_064,
        3584,
        18_944,
        28,
        28,
        4,
        attention_bias=True,
        max_position_embeddings=4096,
        model_type="qwen2",
        o_proj_bias=False,
    ),
    "gemma3-4b": LlamaConfig(
        262_208,
        2560,
        10_240,
        34,
        8,
        4,
        256,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
        model_type="gemma3_text",
        qk_norm="head",
        norm_placement="both",
        hidden_act="gelu_pytorch_tanh",
        scale_embeddings=True,
        query_pre_attn_scalar=256,
    ),
}
"""By the models' names; contexts are those before an extension."""


@dataclass(frozen=True)
class Hardware:
    """One device that trains, and what part of it is not ours."""

    name: str
    bytes: float
    """Memory of a device."""
    flops: float | None
    """Dense peak of products in FLOP/s, bfloat16 on GPUs; None: unknown."""
    reserved: float = 3 * GIB
    """Bytes for the CUDA context, NCCL and gaps in torch's allocator."""
    efficiency: float = 0.4
    """Share of the peak that a step is expected to reach (MFU, causal)."""

    @property
    def is_cpu(self) -> bool:
        """Whether products run on the host."""
        return self.name == "cpu"


HARDWARE = {
    "a100_80gb": Hardware("a100_80gb", 80 * GIB, DENSE_BF16_PEAKS["A100"]),
    "h100_80gb": Hardware("h100_80gb", 80 * GIB, DENSE_BF16_PEAKS["H100"]),
    "h200_141gb": Hardware("h200_141gb", 140 * GIB, DENSE_BF16_PEAKS["H200"]),
    "b200_192gb": Hardware("b200_192gb", 179 * GIB, DENSE_BF16_PEAKS["B200"]),
}
"""By name; memory as the driver shows it."""


def found_hardware() -> Hardware:
    """Return the first GPU of this machine, or else its CPU."""
    if not torch.cuda.is_available():
        return this_cpu()
    properties = torch.cuda.get_device_properties(0)
    return Hardware(properties.name, properties.total_memory, peak_flops(properties.name))


def this_cpu() -> Hardware:
    """Return this machine's host memory, of its container where that has less; no peak is known."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    available = min(physical, int(text)) if text.isdigit() else physical
    return Hardware("cpu", available, None, reserved=GIB, efficiency=0.6)


def named_hardware(name: str | None) -> Hardware:
    """Return a device by its name in `HARDWARE`, or `cpu`; None: what this machine has."""
    if name is None:
        return found_hardware()
    if name == "cpu":
        return this_cpu()
    if name not in HARDWARE:
        known = ", ".join((*HARDWARE, "cpu"))
        raise ValueError(f"hardware {name!r} unknown; expected one of {known}")
    return HARDWARE[name]
