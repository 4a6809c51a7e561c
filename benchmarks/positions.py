"""What each position scheme costs: a training step, and the attention part alone, next to RoPE.

    python benchmarks/positions.py    # 6 minutes on two cores; a look: --tokens 2048 --seconds 5

Schemes take turns, each round beginning with another; ratios are of each one's fastest run, which
other work on the machine disturbs least. ABF is RoPE with another base: its ratio is the noise. On
the CPU a training window holds documents of 1,024 tokens (on CUDA a single one): with little
attention, positions have their largest share. The attention part is position layer and attention,
forward and backward, on one document; its memory is what a process of its own adds.
"""

import argparse
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn
from train_step import peak, reset_peak, resident

from lit_longctx import position
from lit_longctx.batch import Batch, one_document, pack
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.layers import Layers
from lit_longctx.model.sdpa import SDPA
from lit_longctx.training.activations import apply_recompute

torch.set_num_threads(2)  # here, so that it holds in the processes that measure memory too
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = torch.device("cuda" if CUDA else "cpu"), torch.bfloat16 if CUDA else torch.float32
HEADS, KV_HEADS, DIM = 8, 4, 128 if CUDA else 32
SHAPE = LlamaConfig(512, HEADS * DIM, HEADS * DIM * 11 // 4, 2, HEADS, KV_HEADS)
DOCUMENT, ATTENTION, MATRIX = (2**20, 2**20, 8192) if CUDA else (1024, 8192, 4096)
"""Tokens: longest document of a step, longest attention part, longest that holds seq × seq."""
LONGER: dict[str, Any] = {"factor": 8.0, "original_context": 4096}
TWOS = [2.0] * (DIM // 2)
HALF, FULL = "TransformerXL, distance_dim = head_dim / 2", "TransformerXL, distance_dim = head_dim"
SHIFTED = "the same by rel_shift"
SCHEMES: dict[str, position.PositionScheme] = {
    "RoPE": position.RoPE(),
    "ABF": position.RoPE(5e5),
    "PositionInterpolation": position.PositionInterpolation(factor=8.0),
    "NTKAware": position.NTKAware(factor=8.0),
    "DynamicNTK": position.DynamicNTK(**LONGER),
    "YaRN": position.YaRN(**LONGER),
    "Llama3": position.Llama3(**LONGER),
    "LongRoPE": position.LongRoPE(short_factor=TWOS, long_factor=TWOS, **LONGER),
    "XPos": position.XPos(),
    HALF: position.TransformerXL(distance_dim=DIM // 2),
    FULL: position.TransformerXL(distance_dim=DIM),
}
STEP_GOALS = dict.fromkeys(list(SCHEMES)[1:-2], 1.03)
ATTENTION_GOALS = {HALF: 1.6, FULL: 2.2}
Times = dict[str, list[float]]


def training_steps(tokens: int) -> dict[str, Callable[[], object]]:
    """Return forward, backward and update of a small Llama for each scheme.

    Rotary schemes take turns in one model: where its weights lie in memory is worth some percent.
    """
    ids = torch.full((1, tokens + 1), 3, device=DEVICE)
    ids[0, ::DOCUMENT] = 1
    rotary = trained(position.RoPE())
    models = {name: rotary if "XL" not in name else trained(SCHEMES[name]) for name in SCHEMES}
    return {name: partial(step, *models[name], name, pack(ids, bos=1)) for name in SCHEMES}


def trained(scheme: position.PositionScheme) -> tuple[Llama, torch.optim.Optimizer]:
    llama = Llama(SHAPE, scheme).to(DEVICE, DTYPE)
    apply_recompute(llama)
    for weight in llama.parameters():
        nn.init.normal_(weight, std=0.02)
    return llama, torch.optim.AdamW(llama.parameters(), lr=0.0, fused=True)


def step(llama: Llama, optimizer: torch.optim.Optimizer, name: str, batch: Batch) -> None:
    if llama.position != SCHEMES[name]:
        llama.layers = Layers.uniform(SCHEMES[name], SHAPE.num_hidden_layers)
        for block in llama.model.layers:
            attention: Any = block.self_attn
            attention.position = SCHEMES[name].layer(HEADS, DIM)
    llama.loss(batch)[0].backward()
    optimizer.step()
    optimizer.zero_grad()


def attention_part(name: str, tokens: int) -> Callable[[], Tensor]:
    """Return position layer and attention, forward and backward; called, it returns the output."""
    torch.manual_seed(0)
    scheme = SCHEMES[FULL if name == SHIFTED else name]
    layer: Any = scheme.layer(HEADS, DIM).to(DEVICE, DTYPE)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.2)
    made: dict[str, Any] = {"device": DEVICE, "dtype": DTYPE, "requires_grad": True}
    q, k, v = [torch.randn(1, tokens, n, DIM, **made) for n in (HEADS, KV_HEADS, KV_HEADS)]
    documents = one_document(1, tokens, DEVICE)
    code = scheme.encode(torch.arange(tokens, device=DEVICE)[None], DIM, documents)
    mask = SDPA().prepare(documents, documents)

    def run() -> Tensor:
        if name == SHIFTED:
            out = rel_shift_attention(layer, q, k, v, code[0].flip(0).to(DTYPE))
        else:
            wide_q, wide_k = layer(q, k, code)
            out = SDPA().attend(wide_q, wide_k, v, mask, scale=DIM**-0.5)
        out.sum().backward()
        return out.detach()

    return run


def rel_shift_attention(layer: Any, q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Dai et al. 2019 as they wrote it; r holds the sinusoids of the distances seq − 1 … 0."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (k, v))
    seq = q.shape[1]
    keys = einsum(r, layer.distance_weight, "seq place, head dim place -> seq head dim")
    content = einsum(q + layer.content_bias, k, "b i h d, b j h d -> b h i j")
    places = einsum(q + layer.position_bias, keys, "b i h d, j h d -> b h i j")
    places = F.pad(places, (1, 0)).view(1, HEADS, seq + 1, seq)[:, :, 1:].view_as(content)
    later = torch.ones(seq, seq, dtype=torch.bool, device=q.device).triu(1)
    scores = ((content + places) * DIM**-0.5).masked_fill(later, float("-inf"))
    return einsum(scores.softmax(-1), v, "b h i j, b j h d -> b i h d")


def take_turns(runs: Mapping[str, Callable[[], object]], seconds: float) -> Times:
    """Time all runs round by round, for so many seconds and at least three rounds."""
    names = list(runs)
    for name in names if CUDA else names[:1]:
        runs[name]()  # kernels are chosen and memory is taken before the clock runs
    times: Times = {name: [] for name in names}
    begin = time.monotonic()
    while (done := len(times["RoPE"])) < 3 or time.monotonic() - begin < seconds:
        first = done % len(names)
        for name in names[first:] + names[:first]:
            start = time.monotonic()
            runs[name]()
            if CUDA:
                torch.cuda.synchronize()
            times[name].append(time.monotonic() - start)
    return times


def peak_mib(name: str, tokens: int) -> float:
    """Peak memory of one attention part; meant for a process that does nothing else."""
    attention_part(name, 64)()  # what libraries take once is not the scheme's
    run = attention_part(name, tokens)
    standing = torch.cuda.memory_allocated() if CUDA else resident()
    (torch.cuda.reset_peak_memory_stats if CUDA else reset_peak)()
    run()
    return ((torch.cuda.max_memory_allocated() if CUDA else peak()) - standing) / 2**20


def table(title: str, tokens: list[int], rows: dict[str, list[str]]) -> str:
    lines = [["", *(f"{t:,} tokens" for t in tokens)], ["---"] * (len(tokens) + 1)]
    lines += [[name, *cells, *["–"] * (len(tokens) - len(cells))] for name, cells in rows.items()]
    return f"\n## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def compare(title: str, found: dict[int, Times], goals: dict[str, float]) -> Iterator[str]:
    """Yield a table, RoPE in milliseconds and the others relative to it, then the verdicts."""
    rows = {"RoPE": [f"{min(times['RoPE']) * 1e3:,.1f} ms" for times in found.values()]}
    verdicts = []
    for name in list(next(iter(found.values())))[1:]:
        ratios = [min(t[name]) / min(t["RoPE"]) for t in found.values() if name in t]
        rows[name] = [f"{ratio:.3f}" for ratio in ratios]
        if name in goals:
            word = "pass" if max(ratios) <= goals[name] else "short"
            verdicts += [f"- {word}: {name} at most {max(ratios):.3f}, goal {goals[name]:.2f}"]
    yield table(title, list(found), rows)
    yield from verdicts


def report(tokens: list[int], seconds: float) -> Iterator[str]:
    """Measure and yield the Markdown, part by part."""
    two = attention_part(SHIFTED, 64)(), attention_part(FULL, 64)()
    torch.testing.assert_close(*two, atol=0.05 if CUDA else 1e-4, rtol=0)
    threads = f"{platform.machine()} with {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if CUDA else threads
    yield f"# Position schemes: torch {torch.__version__}, {device}, {DTYPE}"
    found = {t: take_turns(training_steps(t), seconds) for t in tokens}
    yield from compare("Training step, time relative to RoPE", found, STEP_GOALS)
    tokens = [t for t in tokens if t <= ATTENTION] or [ATTENTION]
    names = {t: ["RoPE", HALF, FULL, *[SHIFTED] * (t <= MATRIX)] for t in tokens}
    found = {t: take_turns({n: attention_part(n, t) for n in names[t]}, seconds) for t in tokens}
    yield from compare("Attention part, time relative to RoPE", found, ATTENTION_GOALS)
    memory: dict[str, list[str]] = {name: [] for name in names[tokens[0]]}
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        for name, window in [(n, t) for t in tokens for n in names[t]]:
            memory[name].append(f"{fresh.submit(peak_mib, name, window).result():,.0f}")
    yield table("Attention part, peak memory in MiB", tokens, memory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time and memory of position schemes")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192, 32_768])
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring per column")
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    options = parser.parse_args()
    parts = []
    for part in report(sorted(options.tokens), options.seconds):
        print(part, flush=True)
        parts.append(part)
    if options.output:
        options.output.write_text("\n".join(parts) + "\n")
