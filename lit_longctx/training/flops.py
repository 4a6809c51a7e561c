"""Model FLOPs of a training step, and the peak of the GPU that they are compared with (MFU)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lit_longctx.batch import NO_TARGET, Batch
from lit_longctx.model import LlamaConfig
from lit_longctx.model.layers import Layers

DENSE_BF16_PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}
"""FLOP/s of NVIDIA's data sheets, without sparsity, by part of the device's name; first match."""


def peak_flops(device_name: str) -> float | None:
    """Return a GPU's dense bfloat16 peak in FLOP/s; None where the table does not have it."""
    peaks = (peak for part, peak in DENSE_BF16_PEAKS.items() if part in device_name)
    return next(peaks, None)


class ModelFlops(NamedTuple):
    """FLOPs of forward and backward passes, without what is recomputed."""

    causal: Float[Tensor, ""]
    """With the query-key pairs that the mask lets through, len·(len + 1) / 2 a document."""
    full: Float[Tensor, ""]
    """With len² pairs a document, as if attention were not causal (torchtitan's convention)."""


def model_flops(config: LlamaConfig, layers: Layers, batch: Batch) -> ModelFlops:
    """Return 6 FLOPs per weight and token, and 12·heads·head_dim per query-key pair and layer.

    Chowdhery et al. 2022 (arXiv:2204.02311), appendix B, with the pairs of each document instead of
    those of the whole row. Padding (documents without targets), the embedding's lookup and the keys
    of a memory do not count. float64, on the batch's device.
    """
    sizes = batch.documents.boundaries.diff().long()
    documents = torch.arange(len(sizes), device=sizes.device)
    document = documents.repeat_interleave(sizes, output_size=batch.labels.numel())
    targets = torch.zeros_like(sizes)
    targets.index_add_(0, document, (batch.labels != NO_TARGET).long().flatten())
    lengths = torch.where(targets > 0, sizes, 0).double()
    full = len(layers.kind_of) * lengths.square().sum()
    causal = torch.zeros_like(full)
    for number, kind in enumerate(layers.kinds):
        seen = lengths if kind.window is None else lengths.clamp(max=kind.window)
        pairs = (seen * (seen + 1) / 2 + (lengths - seen) * seen).sum()
        causal += layers.kind_of.count(number) * pairs
    weights = 6 * matrix_weights(config) * lengths.sum()
    per_pair = 12 * config.num_attention_heads * config.head_width
    return ModelFlops(weights + per_pair * causal, weights + per_pair * full)


def matrix_weights(config: LlamaConfig) -> int:
    """Return the weights that every token is multiplied with: blocks and head."""
    attention = 2 * (config.num_attention_heads + config.kv_heads) * config.head_width
    block = config.hidden_size * (attention + 3 * config.intermediate_size)
    return config.num_hidden_layers * block + config.vocab_size * config.hidden_size
