"""What only a GPU can say: attention kernels, training steps, longest windows, a resume's bits.

    python benchmarks/gpu.py --minutes 9           # the next cells; the same command goes on later
    python benchmarks/gpu.py --minutes 0 --report  # tables of what is there so far
    python benchmarks/gpu.py --tiny                # the same code on a CPU, with shapes of a toy

From the repository's root. First the tests marked `gpu`, then one cell after another, each in a
process of its own and appended to --output as a line of JSON when it is done. A cell that fails is
written too, with its error. Every line names the card. Weights are random, of Llama-3.2-1B's shape.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lit_longctx.batch import Batch, pack
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.attention import AttnImplementation, attention_backend
from lit_longctx.model.layers import Layers
from lit_longctx.position import RoPE
from lit_longctx.training.activations import apply_levers
from lit_longctx.training.estimate import Workload, longest_window
from lit_longctx.training.flops import model_flops, peak_flops
from lit_longctx.training.hardware import SHAPES, found_hardware
from lit_longctx.training.memory_count import Levers

GOAL_MFU = 0.5
"""Causal MFU aimed at from 32,768 tokens on; the best published on Hopper is 0.28 to 0.38."""
BACKENDS: list[AttnImplementation] = ["sdpa", "varlen", "flex_attention", "flash_attention_2"]
LEVERS = {
    "elementwise": Levers("elementwise"),
    "block": Levers("block"),
    "block, tiled": Levers("block", mlp_tile_tokens=4096),
    "block, tiled, offloaded": Levers("block", "block_inputs", 4096),
}
TINY = LlamaConfig(512, 64, 176, 2, 4, 2)
Cell = dict[str, Any]


def cells(tiny: bool) -> Iterator[Cell]:
    """Yield what is measured, most wanted first."""
    lengths = [512, 1024] if tiny else [8192, 32_768, 65_536, 131_072]
    for tokens, who in itertools.product(lengths, ("ours", "transformers")):
        yield {"kind": "step", "who": who, "tokens": tokens, "documents": 1}
    yield {"kind": "resume"}
    backends = BACKENDS[:1] if tiny else BACKENDS
    for backend, documents, tokens in itertools.product(backends, (1, 64), lengths):
        yield {"kind": "attention", "backend": backend, "documents": documents, "tokens": tokens}
    for name in LEVERS:
        yield {"kind": "longest", "levers": name}
    for tokens in lengths[:2]:
        yield {"kind": "step", "who": "ours", "tokens": tokens, "documents": 64}
    yield {"kind": "loader"}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def timed(call: Callable[[], Any], tiny: bool) -> dict[str, float]:
    """Seconds of a call, the median of several, and the spread."""
    seconds: list[float] = []
    for _ in range(3 if tiny else 7):
        begin = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    timings = seconds[1:]
    return {"seconds": median(timings), "least": min(timings), "most": max(timings)}


def packed(tokens: int, documents: int, vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (1, tokens + 1), generator=generator)
    ids[0, : tokens : tokens // documents] = 1
    batch = pack(ids, bos=1)
    return tree_map_only(Tensor, lambda x: x.to(device()), batch)


def attention(cell: Cell, tiny: bool) -> Cell:
    """One layer of Llama-3-8B's heads, forward and both passes."""
    heads, kv_heads, dim = (4, 2, 32) if tiny else (32, 8, 128)
    backend = attention_backend(cell["backend"])
    documents = packed(cell["tokens"], cell["documents"], 512).documents
    q, k, v = (
        torch.randn(1, cell["tokens"], n, dim, device=device(), dtype=dtype(), requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    mask = backend.prepare(documents, documents)

    def forward() -> Tensor:
        return backend.attend(q, k, v, mask, dim**-0.5)

    def both() -> None:
        forward().sum().backward()

    pairs = documents.boundaries.diff().double().square().sum().item() / 2
    found = {"forward": timed(lambda: forward().detach(), tiny), "both": timed(both, tiny)}
    for name, passes in (("forward", 4), ("both", 14)):  # 2 products, and 5 in backward
        found[name]["tflops"] = passes * pairs * heads * dim / found[name]["seconds"] / 1e12
    return found


def model(who: str, tiny: bool, levers: Levers) -> tuple[Any, Callable[[Batch], Tensor]]:
    """A model with bfloat16 weights on a GPU, and what computes its mean loss."""
    config = TINY if tiny else SHAPES["llama3.2-1b"]
    if who == "ours":
        with torch.device(device()):
            llama = Llama(config, RoPE()).to(dtype())
        arguments = levers.recompute, levers.offload, levers.mlp_tile_tokens
        apply_levers(llama, *arguments)
        return llama, lambda batch: llama.loss(batch)[0] / batch.labels.numel()
    import transformers

    their_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_width,
        tie_word_embeddings=config.tie_word_embeddings,
        max_position_embeddings=2**20,
    )
    flash = transformers.utils.is_flash_attn_2_available() and torch.cuda.is_available()
    their_config._attn_implementation = "flash_attention_2" if flash else "sdpa"
    with torch.device(device()):
        theirs: Any = transformers.LlamaForCausalLM(their_config)
    theirs.to(dtype())
    if levers.recompute == "block":
        theirs.gradient_checkpointing_enable()
        theirs.train()

    def loss(batch: Batch) -> Tensor:
        labels = {"labels": batch.labels, "shift_labels": batch.labels}
        return theirs(batch.input_ids, use_cache=False, **labels).loss

    return theirs, loss


def step(cell: Cell, tiny: bool) -> Cell:
    """A training step with AdamW; whole blocks are recomputed by both, from 32,768 tokens on."""
    levers = Levers("block" if cell["tokens"] >= 32_768 else "elementwise")
    if cell["who"] == "transformers" and levers.recompute == "elementwise":
        levers = Levers("none")  # has no such thing
    llama, loss = model(cell["who"], tiny, levers)
    config = TINY if tiny else SHAPES["llama3.2-1b"]
    batch = packed(cell["tokens"], cell["documents"], config.vocab_size)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-5, fused=True)

    def one() -> None:
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found: Cell = timed(one, tiny)
    found["tokens_per_s"] = cell["tokens"] / found["seconds"]
    if torch.cuda.is_available():
        found["gib"] = torch.cuda.max_memory_allocated() / 2**30
        if peak := peak_flops(torch.cuda.get_device_name()):
            layers = Layers.uniform(RoPE(), config.num_hidden_layers)
            flops = float(model_flops(config, layers, batch).causal)
            found["mfu_causal"] = flops / found["seconds"] / peak
    return found


def longest(cell: Cell, tiny: bool) -> Cell:
    """Whether the plan's longest window runs, and one a twentieth longer does not."""
    levers = LEVERS[cell["levers"]]
    if tiny:
        tokens = 1024
    else:
        work = Workload(SHAPES["llama3.2-1b"], levers, 1, 2**30, 1, processes=1)
        tokens = longest_window(work, found_hardware())
    return {"planned": tokens, "runs": trained(tokens, cell["levers"], tiny)} | (
        {}
        if tiny
        else {"longer_runs": trained(tokens * 21 // 20 // 256 * 256, cell["levers"], tiny)}
    )


COMMAND = [sys.executable, "-m", "lit_longctx.cli"]


def fit(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `lit_longctx fit` on bytes of Python's own files, in a process of its own."""
    data = Path("runs/gpu_data")
    if not data.is_dir():  # bytes of Python's own files
        prepared = ["prepare", "--input", "[stdlib]", "--tokenizer", "bytes", "--output", str(data)]
        subprocess.run([*COMMAND, *prepared], check=True, capture_output=True)
    sources = json.dumps({"stdlib": {"folder": str(data)}})
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    given = ["--config=config/debug_cpu.yaml", f"--data.init_args.sources={sources}"]
    given += [f"--trainer.default_root_dir={folder}", f"--trainer.accelerator={accelerator}"]
    return subprocess.run([*COMMAND, "fit", *given, *options], capture_output=True, text=True)


def trained(tokens: int, levers: str, tiny: bool) -> bool:
    """Whether two micro-batches of one row and their update fit, as `fit` runs them."""
    config = TINY if tiny else SHAPES["llama3.2-1b"]
    chosen = LEVERS[levers]
    shape = asdict(config)
    shape |= {"bos_token_id": 256, "eos_token_id": 257, "tie_word_embeddings": True}
    folder = Path(tempfile.mkdtemp(dir="runs"))
    ran = fit(
        folder,
        f"--model.init_args.config={json.dumps(shape)}",
        f"--model.init_args.recompute={chosen.recompute}",
        f"--model.init_args.offload={chosen.offload}",
        f"--model.init_args.mlp_tile_tokens={json.dumps(chosen.mlp_tile_tokens)}",
        f"--model.init_args.compute_dtype={'bfloat16' if torch.cuda.is_available() else 'float32'}",
        f"--data.init_args.window={tokens}",
        f"--data.init_args.batch_tokens={2 * tokens}",
        "--data.init_args.held_out_windows=0",
        "--model.init_args.schedule.init_args.warmup_steps=0",
        "--trainer.max_steps=1",
        "--checkpoints.every_n_steps=1000",
        "--force",
    )
    if ran.returncode and "out of memory" not in ran.stderr.lower():
        raise RuntimeError(ran.stderr.strip()[-500:])
    return ran.returncode == 0


def resume(_: Cell, __: bool) -> Cell:
    """Whether 10 steps, and 5 and 5 after a resume, have the same losses to the last bit."""
    folder = Path(tempfile.mkdtemp(dir="runs"))
    common = ["--model.init_args.schedule=WarmupConstant"]
    ran = [
        fit(folder / "whole", "--trainer.max_steps=10", *common),
        fit(folder / "parts", "--trainer.max_steps=5", *common),
        fit(folder / "parts", "--trainer.max_steps=10", "--ckpt_path=last", *common),
    ]
    if failed := [each.stderr for each in ran if each.returncode]:
        raise RuntimeError(failed[0].strip()[-500:])
    whole, parts = (scalars(folder / name, "train/loss") for name in ("whole", "parts"))
    return {"same_bits": whole == parts, "steps": len(whole)}


def loader(_: Cell, __: bool) -> Cell:
    """Percent of a step that it waits for data, with two workers."""
    folder = Path(tempfile.mkdtemp(dir="runs"))
    ran = fit(folder, "--trainer.max_steps=40", "--data.init_args.num_workers=2")
    if ran.returncode:
        raise RuntimeError(ran.stderr.strip()[-500:])
    return {"data_wait_pct": scalars(folder, "perf/data_wait_pct")[-1]}


def scalars(run: Path, name: str) -> list[float]:
    """Values that a run logged, by step; of a step that was run twice, the last."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in sorted(run.glob("events.*")):
        events = EventAccumulator(str(file)).Reload()
        if name in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars(name)}
    return [found[number] for number in sorted(found)]


MEASURES: dict[str, Callable[[Cell, bool], Cell]] = {
    "attention": attention,
    "step": step,
    "longest": longest,
    "resume": resume,
    "loader": loader,
}


# ---- cells, one by one


def card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def done(file: Path) -> list[Cell]:
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


def run_all(file: Path, minutes: float, tiny: bool) -> None:
    """Measure what this card has not been asked yet, until the time is up."""
    begin = time.monotonic()
    known = [each["cell"] for each in done(file) if each["card"] == card()]
    for cell in cells(tiny):
        if time.monotonic() - begin > 60 * minutes:
            return
        if cell in known:
            continue
        command = [sys.executable, __file__, "--cell", json.dumps(cell), *["--tiny"] * tiny]
        ran = subprocess.run(command, capture_output=True, text=True)
        last = (ran.stdout if ran.returncode == 0 else ran.stderr).strip().splitlines()[-1:]
        found = json.loads(last[0]) if ran.returncode == 0 else {"error": "".join(last)[:300]}
        line = {"card": card(), "torch": torch.__version__, "cell": cell, "found": found}
        with file.open("a") as results:
            results.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def gpu_tests() -> None:
    """Run the tests marked gpu; what fails is shown, and the measurements go on."""
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--timeout", "300"])


def report(file: Path) -> Iterator[str]:
    """Yield a Markdown table for each kind of cell."""
    lines = done(file)
    for kind in MEASURES:
        chosen = [each for each in lines if each["cell"]["kind"] == kind]
        if not chosen:
            continue
        asked = [name for name in chosen[0]["cell"] if name != "kind"]
        yield (
            "\n"
            + " | ".join(["| card", *asked, "found |"])
            + "\n"
            + "|---" * (len(asked) + 2)
            + "|"
        )
        for each in chosen:
            found = ", ".join(f"{name} {shown(value)}" for name, value in each["found"].items())
            yield " | ".join(
                [f"| {each['card']}", *(str(each["cell"][n]) for n in asked), f"{found} |"]
            )
    far = [
        each["found"].get("mfu_causal", 0.0)
        for each in lines
        if each["cell"]["kind"] == "step"
        and each["cell"]["who"] == "ours"
        and each["cell"]["tokens"] >= 32_768
    ]
    if far:
        reached = f"{min(far):.2f} to {max(far):.2f}"
        yield f"\ncausal MFU from 32,768 tokens on: {reached}, goal {GOAL_MFU}"


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {shown(each)}" for name, each in value.items()) + ")"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="what only a GPU can say")
    parser.add_argument("--minutes", type=float, default=9, help="no cell is begun after them")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu.jsonl"))
    parser.add_argument("--tiny", action="store_true", help="shapes of a toy, for a CPU")
    parser.add_argument("--report", action="store_true", help="print tables of what there is")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        cell = json.loads(options.cell)
        print(json.dumps(MEASURES[cell["kind"]](cell, options.tiny)))
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available() and not options.output.is_file():
        gpu_tests()
    elif not torch.cuda.is_available() and not options.tiny:
        parser.error("there is no GPU; --tiny tries the script on a CPU")
    if options.minutes:
        run_all(options.output, options.minutes, options.tiny)
    if options.report or options.tiny:
        print("\n".join(report(options.output)))


if __name__ == "__main__":
    main()
