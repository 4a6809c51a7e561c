"""Ours against transformers' LlamaForCausalLM: speed and memory of one training step.

    python benchmarks/train_step.py                      # the table, each cell in its own process
    python benchmarks/train_step.py --cell ours 8192 16  # one cell: tokens, packed documents
    python benchmarks/train_step.py --before CHECKOUT    # an earlier commit too, in the same rounds

Same weights, tokens, float32, AdamW update included. Packed rows give transformers a dense
block-diagonal mask and restarted position_ids. Memory is the peak resident set less what stands
after model and optimizer.
"""

import argparse
import json
import os
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
UNITS = ("tok/s", "MiB")


def window(tokens: int, documents: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, SHAPE["vocab_size"], (1, tokens + 1), generator=generator)
    ids[0, : tokens : tokens // documents] = 1
    return ids


def ours(tokens: int, documents: int):
    from lit_longctx.batch import pack
    from lit_longctx.model import Llama, LlamaConfig, initial_weight
    from lit_longctx.position import RoPE
    from lit_longctx.training.activations import apply_recompute

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


def table(cells: list[tuple[int, int]], rounds: int, before: str | None) -> None:
    """Print a row for each cell; ratios are of the best, with [least, most] of single rounds."""
    scripts = {"ours": __file__, "transformers": __file__}
    if before:
        scripts["before"] = str(Path(before).resolve() / "benchmarks" / "train_step.py")
    print(
        f"torch {torch.__version__}, {THREADS} threads, float32; products "
        f"{ceiling() / 1e9:.0f} GFLOP/s; best of {rounds} rounds, [least, most] of them\n"
    )
    columns = ["tokens", "documents", *(f"{who} {unit}" for who in scripts for unit in UNITS)]
    columns += [f"ours / {who}" for who in scripts if who != "ours"] + ["loss difference"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for tokens, documents in cells:
        found = [
            {who: measured(script, who, tokens, documents) for who, script in scripts.items()}
            for _ in range(rounds)
        ]
        print(row(tokens, documents, found), flush=True)


def row(tokens: int, documents: int, found: list[dict[str, dict[str, float]]]) -> str:
    """Best rate and least memory of each; the rates' ratios with their spread."""
    line = [f"{tokens:,}", str(documents)]
    rates = {who: [cells[who]["tokens_per_s"] for cells in found] for who in found[0]}
    for who in rates:
        memory = min(cells[who]["memory_mib"] for cells in found)
        line += [f"{max(rates[who]):,.0f}", f"{memory:,.0f}"]
    for who in rates:
        if who != "ours":
            ratios = [a / b for a, b in zip(rates["ours"], rates[who], strict=True)]
            best = max(rates["ours"]) / max(rates[who])
            line.append(f"{best:.2f} [{min(ratios):.2f}, {max(ratios):.2f}]")
    losses = [cell["loss"] for cells in found for cell in cells.values()]
    return "| " + " | ".join([*line, f"{max(losses) - min(losses):.1e}"]) + " |"


def measured(script: str, who: str, tokens: int, documents: int) -> dict[str, float]:
    """Run one cell in a process of its own, by the package beside the script."""
    name = "ours" if who == "before" else who
    command = [sys.executable, script, "--cell", name, str(tokens), str(documents)]
    environment = {**os.environ, "PYTHONPATH": str(Path(script).resolve().parents[1])}
    return json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL, env=environment))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="ours against transformers")
    parser.add_argument("--cell", nargs=3, metavar=("WHO", "TOKENS", "DOCUMENTS"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cells", nargs="+", metavar="TOKENS:DOCUMENTS", help="rows of the table")
    parser.add_argument("--before", metavar="CHECKOUT", help="a checkout of an earlier commit")
    arguments = parser.parse_args()
    if chosen := arguments.cell:
        print(json.dumps(cell(chosen[0], int(chosen[1]), int(chosen[2]))))
    else:
        split = (text.partition(":") for text in arguments.cells or [])
        cells = [(int(tokens), int(documents)) for tokens, _, documents in split]
        table(cells or CELLS, arguments.rounds, arguments.before)
