"""Model FLOPs against published counts, torch's own counter and pairs counted one by one."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_longctx.batch import pack
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.layers import LayerKind, Layers
from lit_longctx.position import NoPE, RoPE
from lit_longctx.training.flops import matrix_weights, model_flops, peak_flops

LLAMA_3_8B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_by_the_names_that_drivers_report(name, expected):
    assert peak_flops(name) == expected


def test_llama_3_8b_costs_45_gflops_a_token_and_1_573_mflops_per_token_of_context():
    """6N = 45.0 G and 1.573e6 per token of context, as torchtitan and others count."""
    assert 6 * matrix_weights(LLAMA_3_8B) == pytest.approx(45.0e9, rel=1e-3)
    windows = torch.full((1, 4097), 5)
    layers = Layers.uniform(RoPE(), 32)
    found = model_flops(LLAMA_3_8B, layers, pack(windows, bos=1))
    dense = 6 * matrix_weights(LLAMA_3_8B) * 4096
    assert float(found.full - dense) == pytest.approx(1.573e6 * 4096**2, rel=1e-3)
    assert float(found.causal - dense) == pytest.approx(1.573e6 * 4096**2 / 2, rel=1e-3)


def test_torch_counts_the_same_for_one_document_a_row():
    """Its counter takes attention as full, without the causal half."""
    config = LlamaConfig(64, 32, 48, 3, 4, 2)
    batch = pack(torch.randint(2, 64, (2, 65)), bos=1)
    batch = batch._replace(labels=batch.labels.clamp(min=0))  # the head drops rows without a target
    llama = Llama(config, RoPE())
    with FlopCounterMode(display=False) as counter:
        llama.logits(batch).sum().backward()
    ours = model_flops(config, llama.layers, batch)
    # backward of attention computes the scores again, which is no model FLOP
    again = 2 * 4 * 8 * 3 * 2 * 64**2
    assert float(ours.full) == counter.get_total_flops() - again


def test_pairs_are_those_of_real_documents_and_windows():
    layers = Layers((LayerKind(RoPE(), window=7), LayerKind(NoPE())), (0, 0, 1))
    config = LlamaConfig(64, 32, 48, 3, 4, 2)
    windows = torch.randint(2, 64, (2, 61))
    windows[0, [0, 5, 33]] = 1
    windows[1, 40:] = -100
    found = model_flops(config, layers, pack(windows, bos=1))
    full = causal = tokens = 0
    for length in (5, 28, 27, 40):  # the padding of 20 does not count
        tokens += length
        full += 3 * length**2
        for query in range(length):
            causal += (query + 1) + 2 * min(query + 1, 7)
    dense = 6 * matrix_weights(config) * tokens
    assert float(found.full) == dense + 12 * 32 * full
    assert float(found.causal) == dense + 12 * 32 * causal
