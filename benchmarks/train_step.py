"""Ours against transformers' LlamaForCausalLM: speed and memory of one training step.

    python benchmarks/train_step.py                      # the table, each cell in its own process
    python benchmarks/train_step.py --cell ours 8192 16  # one cell: tokens, packed documents

Same weights, tokens, float32, AdamW update included. Packed rows give transformers a dense
block-diagonal mask and restarted position_ids. Memory is the peak resident set less what stands
after model and optimizer.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

SHAPE: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
CELLS = [(1024, 1), (4096, 1), (8192, 1), (1024, 16), (4096, 16), (8192, 16)]
THREADS = 2
SECONDS = 12.0


def window(tokens: int, documents: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, SHAPE["vocab_size"], (1, tokens + 1), generator=generator)
    ids[0, : tokens : tokens // documents] = 1
    return ids


def ours(tokens: int, documents: int):
    from lit_longctx.batch import pack
    from lit_longctx.model import Llama, LlamaConfig, initial_weight
    from lit_longctx.position import RoPE
    from lit_longctx.training.parallel import apply_recompute

    llama = Llama(LlamaConfig(**SHAPE), RoPE())
    apply_recompute(llama)
    fill(llama, initial_weight)
    batch = pack(window(tokens, documents), bos=1)
    targets = (batch.labels >= 0).sum()
    return llama, lambda: llama.loss(batch)[0] / targets


def theirs(tokens: int, documents: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    from lit_longctx.batch import pack
    from lit_longctx.model import initial_weight

    config = LlamaConfig(**SHAPE, tie_word_embeddings=False)
    config._attn_implementation = "sdpa"
    llama = LlamaForCausalLM(config)
    fill(llama, initial_weight)
    batch = pack(window(tokens, documents), bos=1)
    same = batch.documents.ids[:, :, None] == batch.documents.ids[:, None, :]
    mask = same.tril()[:, None] if documents > 1 else None
    shift = {"shift_labels": batch.labels, "labels": batch.labels}  # already shifted
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, **shift}
    return llama, lambda: llama(attention_mask=mask, use_cache=False, **inputs).loss


@torch.no_grad()
def fill(llama: torch.nn.Module, initial_weight) -> None:
    for name, parameter in llama.named_parameters():
        parameter.copy_(initial_weight(name, parameter.shape, SHAPE["num_hidden_layers"], 0))


def cell(who: str, tokens: int, documents: int) -> dict[str, float]:
    """Time steps for a while in this process."""
    torch.set_num_threads(THREADS)
    llama, loss = {"ours": ours, "transformers": theirs}[who](tokens, documents)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=0.0, fused=True)
    for parameter in llama.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    standing = resident()
    reset_peak()
    seconds, value = [], 0.0
    begin = time.monotonic()
    while len(seconds) < 3 or time.monotonic() - begin < SECONDS:
        start = time.monotonic()
        out = loss()
        out.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        seconds.append(time.monotonic() - start)
        value = float(out.detach())
    rate = tokens / median(seconds[1:])
    return {"tokens_per_s": rate, "memory_mib": (peak() - standing) / 2**20, "loss": value}


def resident() -> float:
    return float(status("VmRSS")) * 1024


def peak() -> float:
    return float(status("VmHWM")) * 1024


def status(key: str) -> str:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return line.split()[1]
    return str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def flops_per_token(tokens: int, documents: int) -> float:
    """6 per weight used in a product, plus causal attention: 6·layers·width·length."""
    s = SHAPE
    width, dim = s["hidden_size"], s["hidden_size"] // s["num_attention_heads"]
    projections = width * width * 2 + width * dim * s["num_key_value_heads"] * 2
    block = projections + 3 * width * s["intermediate_size"]
    weights = s["num_hidden_layers"] * block + s["vocab_size"] * width
    return 6 * weights + 6 * s["num_hidden_layers"] * width * tokens / documents


def ceiling() -> float:
    """Float32 products per second of this machine, in FLOP/s: the best of a few large ones."""
    torch.set_num_threads(THREADS)
    a = torch.randn(2048, 2048)
    best = 0.0
    for _ in range(10):
        start = time.monotonic()
        torch.mm(a, a)
        best = max(best, 2 * 2048**3 / (time.monotonic() - start))
    return best


def table(rounds: int) -> None:
    flops = ceiling()
    print(
        f"torch {torch.__version__}, {THREADS} threads, float32; "
        f"products {flops / 1e9:.0f} GFLOP/s; best of {rounds} pairs, [least, most] of the pairs\n"
    )
    print(
        "| tokens | documents | ours tok/s | transformers tok/s | ratio "
        "| ceiling tok/s | ours MiB | transformers MiB | ratio | loss difference |"
    )
    print("|---" * 10 + "|")
    for tokens, documents in CELLS:
        pairs = [
            [measured(who, tokens, documents) for who in ("ours", "transformers")]
            for _ in range(rounds)
        ]
        a, b = (
            max(each, key=lambda cell: cell["tokens_per_s"]) for each in zip(*pairs, strict=True)
        )
        ratios = sorted(ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in pairs)
        print(
            f"| {tokens:,} | {documents} | {a['tokens_per_s']:,.0f} | {b['tokens_per_s']:,.0f} "
            f"| {a['tokens_per_s'] / b['tokens_per_s']:.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] "
            f"| {flops / flops_per_token(tokens, documents):,.0f} "
            f"| {a['memory_mib']:,.0f} | {b['memory_mib']:,.0f} "
            f"| {a['memory_mib'] / b['memory_mib']:.2f} | {abs(a['loss'] - b['loss']):.1e} |",
            flush=True,
        )


def measured(who: str, tokens: int, documents: int) -> dict[str, float]:
    """Run one cell in a process of its own."""
    command = [sys.executable, __file__, "--cell", who, str(tokens), str(documents)]
    return json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="ours against transformers")
    parser.add_argument("--cell", nargs=3, metavar=("WHO", "TOKENS", "DOCUMENTS"))
    parser.add_argument("--rounds", type=int, default=3, help="pairs per row of the table")
    arguments = parser.parse_args()
    if chosen := arguments.cell:
        print(json.dumps(cell(chosen[0], int(chosen[1]), int(chosen[2]))))
    else:
        table(arguments.rounds)
