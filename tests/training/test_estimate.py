"""What a plan predicts, against what torch's profiler sees a CPU allocate in real steps."""

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from lit_longctx.batch import Batch, one_document
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.keys import OWN
from lit_longctx.model.layers import LayerKind, Layers
from lit_longctx.position import RoPE
from lit_longctx.training import estimate
from lit_longctx.training.activations import apply_levers
from lit_longctx.training.estimate import (
    Workload,
    fewest_devices,
    fits,
    longest_window,
    memory_by_kind,
    seen_per_token,
)
from lit_longctx.training.hardware import GIB, HARDWARE, SHAPES
from lit_longctx.training.memory_count import Levers
from lit_longctx.training.optimizers import make_optimizer
from lit_longctx.training.parallel import apply_sharding
from lit_longctx.training.step import accumulate_gradients

PLAIN = LlamaConfig(512, 256, 896, 4, 8, 2)
WIDE = LlamaConfig(4096, 128, 256, 2, 4, 4, tie_word_embeddings=True)
DEEP = LlamaConfig(256, 128, 384, 8, 4, 1)

CASES = {  # shape, window, rows, micro-batches, dtype of products, levers
    "plain": (PLAIN, 1024, 1, 1, "float32", Levers("elementwise")),
    "short": (PLAIN, 128, 2, 2, "float32", Levers("elementwise")),
    "head": (WIDE, 256, 1, 1, "float32", Levers("block", head_chunk_tokens=64)),
    "offloaded": (DEEP, 1024, 1, 2, "float32", Levers("block", "block_inputs")),
    "block": (PLAIN, 1024, 1, 2, "float32", Levers("block")),
    "tiled": (PLAIN, 1024, 1, 1, "float32", Levers("block", mlp_tile_tokens=128)),
    "none": (PLAIN, 512, 1, 1, "float32", Levers("none")),
    "bfloat16": (PLAIN, 256, 1, 2, "bfloat16", Levers("block")),
    "wide": (WIDE, 1024, 2, 2, "float32", Levers("elementwise")),
    "attention kept": (DEEP, 1024, 1, 1, "float32", Levers("attention_kept")),
    "small moments": (
        DEEP, 64, 1, 1, "float32", Levers("elementwise", optimizer="adamw_bf16_moments"),
    ),
    "long": (DEEP, 2048, 1, 1, "float32", Levers("block")),
}  # fmt: skip
FAST = ("short",)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_never_less_than_is_used_and_within_a_tenth(name, one_process):
    shape, window, rows, micro_batches, dtype, levers = CASES[name]
    dtype = getattr(torch, dtype)
    used = peak_of_a_step(shape, window, rows, micro_batches, dtype, levers)
    work = Workload(
        shape, levers, window, window * rows * micro_batches, rows, processes=1, cpu_dtype=dtype
    )
    memory = memory_by_kind(work)
    predicted = memory.device + memory.host  # all of it is the CPU's
    print(f"{name}: {predicted / used:.3f} × the {used / 2**20:.1f} MiB that were used")
    assert used <= predicted <= 1.1 * used


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def peak_of_a_step(shape, window, rows, micro_batches, dtype, levers):
    """Bytes of states, and of the most that a second step allocates beside them."""
    llama = Llama(shape, RoPE(), "sdpa")
    apply_levers(
        llama, levers.recompute, levers.offload, levers.mlp_tile_tokens, levers.head_chunk_tokens
    )
    apply_sharding(llama, init_device_mesh("cpu", (1,)), dtype)
    groups = [{"params": list(llama.parameters()), "weight_decay": 0.1}]
    optimizer = make_optimizer(levers.optimizer, groups, 1e-4, (0.9, 0.95))

    def step():
        ids = torch.randint(shape.vocab_size, (rows, window))
        positions = torch.arange(window).expand(rows, -1)
        zeros, ones = torch.zeros(rows, dtype=torch.long), torch.ones(rows, window)
        batch = Batch(ids, ids, ones, positions, zeros, zeros, one_document(rows, window))
        batches, sources = [batch] * micro_batches, [OWN] * micro_batches
        accumulate_gradients(llama, batches, sources, torch.Tensor.backward, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events: Any = profiler.profiler.kineto_results.events()  # pyright: ignore
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    moments = [m for state in optimizer.state.values() for m in state.values()]
    states = sum(local(tensor).nbytes for tensor in [*llama.parameters(), *moments])
    return states + max(accumulate(nbytes for _, nbytes in changes))


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


LLAMA3 = Workload(SHAPES["llama3-8b"], Levers(), 2**15, 2**22, 1, processes=8)
H100 = HARDWARE["h100_80gb"]


@pytest.mark.slow
def test_the_longest_window_fits_and_a_little_more_does_not():
    work = replace(LLAMA3, levers=Levers(context_parallel_size=8))
    window = longest_window(work, H100)
    assert fits(replace(work, window=window), H100)
    assert not fits(replace(work, window=round(window * 1.02)), H100)


def test_fewest_devices_fit_and_half_of_them_do_not():
    number = fewest_devices(LLAMA3, H100)
    assert number is not None
    assert fits(replace(LLAMA3, processes=number), H100)
    assert not fits(replace(LLAMA3, processes=number // 2), H100)


def test_states_are_those_of_adamw_divided_among_processes():
    memory = memory_by_kind(LLAMA3)
    assert memory.weights + memory.gradients + memory.moments == 8_030_261_248 * 16 / 8
    offloaded = memory_by_kind(replace(LLAMA3, levers=Levers(cpu_offload=True)))
    assert offloaded.host == 8_030_261_248 * 16 / 8
    assert memory.block_inputs == 32 * 2**15 * 4096 * 2


@pytest.mark.slow
def test_a_bound_lies_above_the_count():
    for shape, window, rows, _, dtype, levers in CASES.values():
        dtype = getattr(torch, dtype)
        work = Workload(shape, levers, window, window * rows, rows, 1, cpu_dtype=dtype)
        if levers.recompute == "none" or shape is WIDE:  # the hungriest
            assert estimate.bound(work) > memory_by_kind(work).device
    assert estimate.bound(LLAMA3) > 80 * GIB


@pytest.mark.parametrize("local", [None, 16])
def test_keys_seen_are_those_of_a_cut_stream(local):
    """Against a long stream of documents that is cut, and counted token by token."""
    lengths = [(10.0, 1.0), (100.0, 2.0), (1000.0, 3.0)]
    window, generator = 256, torch.Generator().manual_seed(0)
    odds = torch.tensor([tokens / length for length, tokens in lengths])
    drawn = torch.multinomial(odds, 20_000, True, generator=generator)
    sizes = torch.tensor([int(length) for length, _ in lengths])[drawn]
    begins = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    place = torch.arange(int(sizes.sum()))
    first = torch.maximum(begins, place // window * window)
    seen = (place - first + 1).clamp(max=local or window).float().mean()
    assert seen_per_token(window, lengths, local) == pytest.approx(float(seen), rel=0.02)


def test_keys_seen_in_rows_of_one_document():
    assert seen_per_token(1000) == 500.5
    assert seen_per_token(1000, local=10) == sum(min(i, 10) for i in range(1, 1001)) / 1000


def test_layers_with_a_window_cost_less():
    shape = SHAPES["llama3-8b"]
    mixed = Layers((LayerKind(RoPE(), 1024), LayerKind(RoPE())), (0, 0, 0, 1) * 8)
    work = replace(LLAMA3, window=2**17)
    full, some = (
        estimate.flops_per_token(work, layers)
        for layers in (Layers.uniform(RoPE(), shape.num_hidden_layers), mixed)
    )
    pairs = 12 * 32 * 128 * 24 * (seen_per_token(2**17) - seen_per_token(2**17, local=1024))
    assert full - some == pytest.approx(pairs)
