"""What extension schemes do to a tiny model that looks up values by key: 512 → 4,096 tokens.

    python benchmarks/extension.py --output benchmarks/results/extension_cpu2_DATE.md

From the repository's root. Documents of `lit_longctx.data.making.synthetic`, the verbs prepare, fit
and evaluate, and config/key_values_*.yaml do it all. A model is trained at 512 tokens from random
weights; then every scheme takes its place twice: as it is, and after a few steps at 4,096 tokens on
longer documents of the same kind. The probe key_values is read by teacher forcing; that this says
what generation would is counted prompt by prompt.
"""

import argparse
import json
import platform
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path
from string import ascii_letters
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from lit_longctx import plots
from lit_longctx.checkpoint import export_pretrained, load_pretrained
from lit_longctx.cli import main as lit_longctx
from lit_longctx.data.making.synthetic import HEAD, KeyValues, text
from lit_longctx.data.tokens.opening import open_tokenizer
from lit_longctx.evaluation.retrieval.key_values import KeyValues as Probe
from lit_longctx.evaluation.retrieval.prompts import Haystack
from lit_longctx.evaluation.retrieval.scoring import generated, teacher_forced
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import PositionInterpolation, PositionScheme, RoPE, YaRN

SHORT, LONG = 512, 4096
FACTOR = LONG / SHORT
SCHEMES: dict[str, PositionScheme] = {
    "rope": RoPE(1e4),
    "interpolation": PositionInterpolation(1e4, factor=FACTOR),
    "abf": RoPE(1e4 * FACTOR),
    "yarn": YaRN(1e4, factor=FACTOR, original_context=SHORT),
}
START = Path("exports/key_values_start")
BEFORE = Path("runs/key_values_short")
GRID = {"lengths": [256, 512, 1024, 2048, 4096], "depths": [0.0, 25.0, 50.0, 75.0, 100.0]}
LINE = 2
"""Tokens of a line: key, value."""
TOKENIZER = Path("data/key_values_tokenizer")
Scores = dict[str, list[list[float]]]


def call(verb: str, *options: str) -> None:
    if lit_longctx([verb, *options]):
        raise SystemExit(f"{verb} failed")


def tokenizer(folder: Path) -> None:
    """Write a tokenizer with a token for every key and every value: two letters, two digits.

    Looking up one token takes a model of two layers; looking up what is spelled takes more.
    """
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    keys = [f"\n{a}{b}:" for a in ascii_letters for b in ascii_letters]
    words = [HEAD, *keys, *(f" {number}" for number in range(10, 100))]
    names = ["<s>", "</s>", "<unk>", *(spelled.pre_tokenize_str(word)[0][0] for word in words)]
    vocabulary = {name: number for number, name in enumerate(names)}
    model = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    split = pre_tokenizers.Split(tokenizers.Regex(r"\n?[^\n:]+:| \d+"), "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence([split, spelled])
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def prepare(name: str, shortest: int, longest: int, tokens: int) -> None:
    """Write and prepare documents; as many tokens are in those of 64 to 128 as of 256 to 512.

    Each asks for all its keys in another order.
    """
    folder, seeded = Path("data") / name, random.Random(name)
    shutil.rmtree(folder, ignore_errors=True)
    rows = folder.with_suffix(".jsonl")
    with rows.open("w") as file:
        for number in count():
            length = 1 / (1 / shortest - seeded.random() * (1 / shortest - 1 / longest))
            lines = max(2, round(length / LINE / 2))
            drawn = KeyValues(questions=lines).draw(lines, number)
            file.write(json.dumps({"id": f"{name} {number}", "text": text(drawn)}) + "\n")
            tokens -= round(length)
            if tokens < 0:
                break
    call("prepare", f"--input={rows}", f"--output={folder}", f"--tokenizer={TOKENIZER}")


def start() -> None:
    """Write random weights: embeddings of deviation 1, matrices of 1/√width.

    From Llama's 0.02, meant for width 4,096, nothing is looked up within 10M tokens.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3 + 1 + 52**2 + 90,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=SHORT,
        bos_token_id=0,
        eos_token_id=1,
    )
    llama = Llama(config, RoPE(1e4))
    for name, weight in llama.named_parameters():
        if weight.ndim == 2:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 1.0 if "embed" in name else 1 / (16.0 if into_residual else 8.0)
            torch.nn.init.normal_(weight, std=std)
    shutil.rmtree(START, ignore_errors=True)
    export_pretrained(llama, START, TOKENIZER)


def train() -> None:
    """Put each scheme in the short model's place, and train each at 4,096 tokens."""
    for name, scheme in SCHEMES.items():
        for folder in (swapped(name), trained(name)):
            shutil.rmtree(folder, ignore_errors=True)
        llama = load_pretrained(BEFORE, position=scheme)
        export_pretrained(llama, swapped(name), TOKENIZER, context=LONG)
        position = {"class_path": type(scheme).__name__, "init_args": asdict(scheme)}  # pyright: ignore
        call(
            "fit",
            "--config=config/key_values_long.yaml",
            f"--model.init_args.position={json.dumps(position)}",
            f"--trainer.default_root_dir={trained(name)}",
        )


def swapped(name: str) -> Path:
    return Path(f"exports/key_values_{name}")


def trained(name: str) -> Path:
    return Path(f"runs/key_values_{name}")


def evaluate(folders: list[Path], samples: int, output: Path) -> Scores:
    """Return the mean score of every length and depth by checkpoint."""
    call(
        "evaluate",
        f"--checkpoint={json.dumps([str(folder) for folder in folders])}",
        "--data=[data/key_values_long]",
        "--tasks=[key_values]",
        f"--grid={json.dumps({**GRID, 'samples': samples})}",
        f"--output={output}",
    )
    return json.loads((output / "results.json").read_text())["probes"]["key_values"]


def agreement(seeds: int = 9) -> str:
    """Compare teacher forcing with generation prompt by prompt, inside and beyond 512 tokens."""
    coder, task = open_tokenizer(str(TOKENIZER)), Probe()
    llama = load_pretrained(BEFORE).eval()
    hay, pairs = Haystack(coder), []
    for length in (128, 256, 384, 512, 768, 1024):
        samples = [task.sample(hay, length, d, s) for d in (0, 33, 67, 100) for s in range(seeds)]
        answers = generated(llama, coder, task, samples)
        scores = (task.score(one, answer) for one, answer in zip(samples, answers, strict=True))
        pairs += zip((each.exact for each in teacher_forced(llama, samples)), scores, strict=True)
    same = sum(exact == bool(score) for exact, score in pairs)
    right = sum(exact for exact, _ in pairs)
    return (
        f"Teacher forcing and generated exact match agree on {same} of {len(pairs)} prompts of 128 "
        f"to 1,024 tokens; teacher_forced is right on {right} and wrong on {len(pairs) - right}."
    )


def table(scores: dict[str, Any]) -> str:
    """Mean over depths by length, a column per checkpoint."""
    lines = [["tokens", *scores], ["---"] * (len(scores) + 1)]
    for i, length in enumerate(GRID["lengths"]):
        lines += [[f"{length:,}", *(f"{np.mean(each[i]):.2f}" for each in scores.values())]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(samples: int, figures: Path) -> Iterator[str]:
    """Do everything and yield the Markdown, part by part."""
    begin = time.monotonic()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    threads = f"{platform.machine()} with {torch.get_num_threads()} threads"
    yield f"# Extension of a key-value model: torch {torch.__version__}, {threads}, float32"
    yield f"Commit {commit.stdout.strip()}; config/key_values_*.yaml; {samples} prompts per cell."
    if not BEFORE.is_dir():  # the longest part; remove the folder to do it again
        tokenizer(TOKENIZER)
        start()
        prepare("key_values_tiny", 18, 40, 3_000_000)
        prepare("key_values_short", 40, SHORT, 4_000_000)
        prepare("key_values_long", SHORT, LONG, 1_000_000)
        call("fit", "--config=config/key_values_short.yaml")
    train()
    yield agreement()
    for title, place in (("swapped in", swapped), ("after training at 4,096", trained)):
        folders = {"before": BEFORE} | {name: place(name) for name in SCHEMES}
        found = evaluate(list(folders.values()), samples, Path("runs/key_values_grid") / title)
        scores = {name: found[str(folder)] for name, folder in folders.items()}
        yield f"## {title}\n\n{table(scores)}"
        picture = figures.with_name(f"{figures.stem}_{title.split()[0]}.png")
        plots.heat_map(GRID["lengths"], GRID["depths"], scores).savefig(picture, dpi=50)
        yield f"![{title}]({picture.name})"
    yield f"{(time.monotonic() - begin) / 60:.0f} minutes in all."


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=8, help="prompts per length and depth")
    parser.add_argument("--output", type=Path, default=Path("runs/extension.md"))
    options = parser.parse_args()
    parts = []
    for part in report(options.samples, options.output):
        print(part, flush=True)
        parts.append(part)
    options.output.write_text("\n\n".join(parts) + "\n")
