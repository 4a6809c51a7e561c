"""Ours against transformers' generate on one checkpoint: tokens per second, prefill memory.

    python benchmarks/generate.py    # minutes on two cores; a look: --prefill 2048 8192 --new 32

Greedy, and both must say the same tokens, or the script fails. Every cell is a process of its own;
speed is that of its fastest run, prompt included. Prefill memory is what reading a prompt and
choosing one token adds at its peak, keys and values included. Weights are random, large enough that
no two tokens are about as likely.
"""

import argparse
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from train_step import peak, reset_peak, resident

from lit_longctx.checkpoint import export_pretrained, load_pretrained
from lit_longctx.decoding import generate
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE

torch.set_num_threads(2)  # here, so that it holds in the processes that measure too
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = torch.device("cuda" if CUDA else "cpu"), torch.bfloat16 if CUDA else torch.float32
WIDTH, HEADS, KV_HEADS, LAYERS = (2048, 16, 8, 16) if CUDA else (256, 8, 4, 4)
SHAPE = LlamaConfig(32_000, WIDTH, WIDTH * 11 // 4, LAYERS, HEADS, KV_HEADS)
WHO = ["ours", "transformers"]
Run = Callable[[Tensor, int], Tensor]


def export(folder: Path) -> Path:
    """Write the checkpoint that both read."""
    torch.manual_seed(0)
    llama = Llama(SHAPE, RoPE(5e5))
    for weight in llama.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        else:
            nn.init.ones_(weight)
    return export_pretrained(llama, folder, context=2**20)


def runner(who: str, folder: Path, prefill_tokens: int) -> Run:
    """Return (prompts, new tokens) → prompts and continuations."""
    if who == "ours":
        llama = load_pretrained(folder).eval().to(DEVICE, DTYPE)
        return lambda ids, new: generate(llama, ids, new, prefill_tokens=prefill_tokens)
    from transformers import LlamaForCausalLM

    theirs: Any = LlamaForCausalLM.from_pretrained(folder, dtype=DTYPE)
    theirs = theirs.eval().to(DEVICE)
    theirs.generation_config.eos_token_id = None
    options = {"do_sample": False, "pad_token_id": 0}
    return lambda ids, new: theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **options
    )


def prompts(batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, SHAPE.vocab_size, (batch, tokens), generator=generator).to(DEVICE)


def speed(
    who: str, folder: Path, batch: int, prompt: int, new: int, rounds: int, prefill_tokens: int
) -> tuple[float, list[list[int]]]:
    """New tokens per second over all rows, and the tokens."""
    run, ids = runner(who, folder, prefill_tokens), prompts(batch, prompt)
    run(ids, 2)  # kernels are chosen and memory is taken before the clock runs
    seconds, found = [], ids
    for _ in range(rounds):
        start = time.monotonic()
        found = run(ids, new)
        _ = found.tolist()  # waits for CUDA
        seconds.append(time.monotonic() - start)
    return batch * new / min(seconds), found[:, prompt:].tolist()


def prefill(
    who: str, folder: Path, tokens: int, prefill_tokens: int
) -> tuple[float, float, list[list[int]]]:
    """Peak MiB and seconds of one prompt and its next token, and that token."""
    run, ids = runner(who, folder, prefill_tokens), prompts(1, tokens)
    run(ids[:, :64], 1)
    standing = torch.cuda.memory_allocated() if CUDA else resident()
    (torch.cuda.reset_peak_memory_stats if CUDA else reset_peak)()
    start = time.monotonic()
    found = run(ids, 1)[:, tokens:].tolist()
    seconds = time.monotonic() - start
    return (
        ((torch.cuda.max_memory_allocated() if CUDA else peak()) - standing) / 2**20,
        seconds,
        found,
    )


def both(measure: Callable[..., tuple], *arguments: Any) -> list[tuple]:
    """Measure ours and theirs, each in a fresh process; fail unless they say the same."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        found = [fresh.submit(measure, who, *arguments).result() for who in WHO]
    assert found[0][-1] == found[1][-1], f"other tokens than transformers' in {arguments[1:]}"
    return found


def verdict(good: bool, text: str) -> str:
    return f"- {'pass' if good else 'short'}: {text}"


def report(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Measure and yield the Markdown, line by line."""
    import transformers

    threads = f"{platform.machine()} with {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if CUDA else threads
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    yield f"# Generation: {versions}, {device}, {DTYPE}\n"
    yield f"{SHAPE}; prefill_tokens {options.prefill_tokens:,}\n"
    yield f"## Greedy decoding of {options.new:,} tokens from {options.prompt:,}, tokens/s\n"
    yield "| batch | ours | transformers | ratio |\n| --- | --- | --- | --- |"
    verdicts = []
    for batch in options.batch:
        given = (batch, options.prompt, options.new, options.rounds, options.prefill_tokens)
        (ours, _), (theirs, _) = both(speed, folder, *given)
        yield f"| {batch} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} |"
        good = ours >= theirs
        verdicts.append(verdict(good, f"batch {batch}: {ours / theirs:.2f} times, goal 1.00"))
    yield "\n## Prefill: peak memory in MiB, seconds\n"
    yield "| tokens | keys and values | ours | transformers | ratio | ours s | transformers s |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for tokens in options.prefill:
        (ours, a, _), (theirs, b, _) = both(prefill, folder, tokens, options.prefill_tokens)
        held = 2 * LAYERS * KV_HEADS * SHAPE.head_width * tokens * DTYPE.itemsize / 2**20
        cells = [f"{x:,.0f}" for x in (held, ours, theirs)]
        yield f"| {tokens:,} | {' | '.join(cells)} | {ours / theirs:.2f} | {a:.1f} | {b:.1f} |"
        good = ours <= theirs
        verdicts.append(verdict(good, f"{tokens:,}: {ours / theirs:.2f} of the memory, goal 1.00"))
    yield "\n" + "\n".join(verdicts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Generation against transformers")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512, help="tokens before decoding")
    parser.add_argument("--new", type=int, default=256, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill", nargs="+", type=int, default=[8192, 32_768])
    parser.add_argument("--prefill_tokens", type=int, default=1024)
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    parts = []
    with tempfile.TemporaryDirectory() as temporary:
        for part in report(parser.parse_args(), export(Path(temporary) / "checkpoint")):
            print(part, flush=True)
            parts.append(part)
    if output := parser.parse_args().output:
        output.write_text("\n".join(parts) + "\n")
