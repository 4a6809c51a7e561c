"""Memory that is counted without data is what the model, its kernels and FSDP2 would hold."""

from dataclasses import replace

import pytest
import torch

from lit_longctx.model import LlamaConfig
from lit_longctx.training.memory_count import (
    Levers,
    LiveBytes,
    count_row,
)

LLAMA = LlamaConfig(128_256, 4096, 14_336, 32, 32, 8)
SMALL = LlamaConfig(512, 256, 896, 32, 32, 8)
"""A sixteenth of Llama-3-8B's widths."""
TOKENS, TILE = 2**12, 2**8


def per_token(levers: Levers, processes: int = 1) -> float:
    """KiB at the widest point of two blocks for every token of a process, of Llama-3-8B."""
    few, more = (count_row(SMALL, n * processes, levers, 2).backward for n in (TOKENS, 2 * TOKENS))
    return 16 * (more - few) / TOKENS / 2**10


def kept_per_token(levers: Levers) -> float:
    """KiB that a block of Llama-3-8B keeps for every token until backward."""
    two, three = (count_row(SMALL, TOKENS, levers, layers).kept for layers in (2, 3))
    return 16 * (three - two) / TOKENS / 2**10


FLOATS = 16 * 4 / 2**10
"""KiB of a float32 for every token, a sixteenth of which is counted."""


def test_live_bytes_rise_and_fall_with_tensors():
    weight = torch.empty(10, 10, device="meta")
    with LiveBytes([weight]) as counted:
        x = torch.empty(100, dtype=torch.float32, device="meta")
        view = x.view(10, 10) @ weight.T  # 400 bytes more; no view and no weight counts
        assert (counted.live, counted.most) == (800, 800)
        del x
        assert (counted.live, counted.most) == (400, 800)
        del view
        assert (counted.live, counted.most) == (0, 800)


def test_a_recomputed_block_keeps_its_input_alone():
    assert kept_per_token(Levers()) == 8  # 4096 × bfloat16
    assert kept_per_token(Levers("attention_kept")) == 16 + 32 * FLOATS  # log-sum-exps of heads
    assert kept_per_token(Levers(offload="block_inputs")) == 0


def test_a_block_that_is_kept_keeps_every_input_of_a_product():
    # x, norm, q, k, v, attention, log-sum-exp, residual, norm, gate, up: SiLU is computed again
    width = 8 + 8 + 8 + 2 + 2 + 8 + 8 + 8 + 28 + 28
    floats = 32 + 2  # of heads, and of two norms
    assert kept_per_token(Levers("elementwise")) == width + floats * FLOATS


@pytest.mark.slow
def test_the_widest_point_is_the_mlp_and_with_tiles_attention():
    # a row's widths around the backward of SiLU: gate, up and product twice, and the residuals
    assert 6 * 28 < per_token(Levers()) < 8 * 28 + 2 * 8 + 8
    tiled = per_token(Levers(mlp_tile_tokens=TILE))
    workspaces = 16 + 16  # dq in float32; dk and dv of all heads
    assert workspaces + 40 < tiled < per_token(Levers()) / 1.8


@pytest.mark.slow
def test_blocks_beyond_the_third_add_what_the_third_does():
    shape = replace(SMALL, num_hidden_layers=6)
    for levers in (Levers(), Levers("attention_kept", "block_inputs", TILE)):
        two, three, six = (count_row(shape, TOKENS, levers, layers) for layers in (2, 3, 6))
        for name in ("kept", "backward", "host"):
            each = [getattr(count, name) for count in (two, three, six)]
            assert each[2] - each[1] == 3 * (each[1] - each[0])


@pytest.mark.slow
def test_heads_gathered_one_by_one_take_an_eighth():
    whole = per_token(Levers(context_parallel_size=8), 8)
    groups = per_token(Levers(context_parallel_size=8, kv_heads_at_once=1), 8)
    own = per_token(Levers(mlp_tile_tokens=TILE))
    assert whole - groups > 0.7 * (2 + 2) * 8  # keys and values of 8 processes, of which one head
    tiled = Levers(context_parallel_size=8, context_parallel="ulysses", mlp_tile_tokens=TILE)
    assert per_token(tiled, 8) == pytest.approx(own, rel=0.15)  # whole rows of an eighth of heads
