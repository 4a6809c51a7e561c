"""`lit_longctx evaluate`: the same held-out tokens for every checkpoint, side by side."""

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_longctx import plots
from lit_longctx.attention import AttnImplementation
from lit_longctx.batch import pack
from lit_longctx.checkpoint import load_pretrained, resolve, tokenizer_folder, trained_context
from lit_longctx.data.tokenizer import Tokenizer, check_tokenizer, open_tokenizer
from lit_longctx.data.windows import Windows
from lit_longctx.evaluation.grid import Grid
from lit_longctx.evaluation.metrics import LossByPosition
from lit_longctx.evaluation.probes import task_named
from lit_longctx.evaluation.prompts import Haystack
from lit_longctx.model import Llama, chosen_device


def evaluate(
    checkpoint: list[str],
    data: list[str],
    output: str,
    tasks: list[str] = ["loss"],  # noqa: B006 - never changed
    window: int = 4096,
    windows: int = 32,
    grid: Grid = Grid(),
    attn_implementation: AttnImplementation = "sdpa",
    device: str = "auto",
) -> dict[str, Any]:
    """Measure checkpoints side by side; of several the first is the yardstick.

    Args:
        checkpoint: Run folders or Hugging Face folders.
        data: Prepared folders; their held-out split is read, and needles are hidden in the first's.
        output: Folder for results.json, tables and figures.
        tasks: What to measure: `loss` by position; passkey, needle, first_sentence, multi_key,
            multi_value, multi_query, variable_tracking, common_words, frequent_words.
        window: Tokens per row of the loss, a multiple of 256.
        windows: Rows per source, spread evenly over the held-out split.
        grid: Lengths and depths of the other tasks.
        attn_implementation: Attention back end.
        device: `cpu`, `cuda`, or `auto` for CUDA where there is one.

    Returns:
        What results.json holds.
    """
    device = chosen_device(device)
    probes = {name: task_named(name) for name in tasks if name != "loss"}
    opened = held_out_windows(data, window)
    starts = {folder: resolve(folder) for folder in checkpoint}  # hashes a run's checkpoint: once
    trained = trained_context(starts[checkpoint[0]])
    losses: dict[str, LossByPosition] = {}
    scores: dict[str, dict[str, Any]] = {name: {} for name in probes}
    for folder, start in starts.items():
        llama = load_pretrained(start, attn_implementation=attn_implementation).to(device).eval()
        own = tokenizer_folder(start)
        for source in opened.values():
            check_tokenizer(source.manifest["tokenizer"], llama.config.vocab_size, own)
        if "loss" in tasks:
            losses[folder] = held_out_loss(llama, opened, window, windows, progress=counter(folder))
        if not probes:
            continue
        if own is None:
            raise ValueError(f"{folder} has no tokenizer, which {', '.join(probes)} need")
        coder = open_tokenizer(str(own))
        hay = haystack(coder, next(iter(opened.values())), max(grid.lengths))
        for name, task in probes.items():
            found = grid.scores(llama, coder, task, hay, counter(f"{name} {folder}"))
            scores[name][folder] = found.tolist()
    result: dict[str, Any] = {"window": window, "trained_context": trained}
    if losses:
        result |= {
            "edges": next(iter(losses.values())).edges,
            "loss": {name: metric.by_bucket() for name, metric in losses.items()},
            "overall": {name: metric.scalars()["val/loss"] for name, metric in losses.items()},
            "targets": next(iter(losses.values())).compute()[1].sum(0).tolist(),
        }
    if len(losses) > 1:
        result["gain"] = gains(list(losses.values()), trained)
    if probes:
        result |= {"grid": vars(grid), "probes": scores}
    write(result, Path(output))
    print("\n\n".join(tables(result).values()))
    print(f"wrote {output}/results.json, tables and figures")
    return result


def haystack(tokenizer: Tokenizer, held_out: Windows, tokens: int) -> Haystack:
    """Return held-out text, twice as long as the longest prompt, to hide needles in."""
    return Haystack.of_tokens(tokenizer, held_out.read(0, min(held_out.tokens, 2 * tokens)))


def held_out_windows(folders: list[str], window: int) -> dict[str, Windows]:
    """Open the held-out splits, under their folders' names."""
    opened: dict[str, Windows] = {}
    for folder in folders:
        name = Path(folder).resolve().name
        if name in opened:
            raise ValueError(
                f"two data folders are named {name}; rename one or evaluate one by one"
            )
        opened[name] = Windows(folder, "held_out", window)
        if not len(opened[name]):
            raise ValueError(
                f"held-out split of {name} is shorter than a window of {window} tokens"
            )
    return opened


@torch.inference_mode()
def held_out_loss(
    llama: Llama,
    sources: dict[str, Windows],
    window: int,
    windows: int,
    progress: Callable[[int, int], None] | None = None,
) -> LossByPosition:
    """Return the loss of a model on evenly spread held-out windows, one row at a time."""
    metric = LossByPosition(list(sources), window)
    device = llama.head_weight.device
    chosen = [
        (number, source, int(place))
        for number, source in enumerate(sources.values())
        for place in np.linspace(0, len(source) - 1, min(windows, len(source))).round()
    ]
    for done, (number, source, place) in enumerate(chosen, 1):
        tokens = torch.from_numpy(source[place])[None].to(device)
        batch = pack(tokens, source.manifest["tokenizer"]["bos"], sources=torch.tensor([number]))
        metric.to(device).update(llama(batch), batch._replace(sources=batch.sources.to(device)))
        if progress:
            progress(done, len(chosen))
    return metric


def counter(name: str) -> Callable[[int, int], None]:
    """Return a progress report that rewrites its line on a terminal and is silent elsewhere."""

    def report(done: int, of: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == of else ""
            print(f"\revaluate {name}: {done}/{of}", end=end, file=sys.stderr, flush=True)

    return report


def gains(losses: list[LossByPosition], trained: int) -> dict[str, float]:
    """Mean nats that the last checkpoint saves, inside and beyond `trained` tokens."""
    found = {}
    edges = losses[0].edges
    inside = torch.tensor([high <= trained for high in edges[1:]])
    counted = [losses[0].compute(), losses[-1].compute()]
    for name, part in (("inside", inside), ("beyond", ~inside)):
        sums = [(nats.sum(0)[part].sum(), n.sum(0)[part].sum()) for nats, n in counted]
        if all(n for _, n in sums):
            first, last = (float(nats / n) for nats, n in sums)
            found[name] = first - last
    return found


def table(result: dict[str, Any]) -> str:
    """Loss by position as a Markdown table."""
    names = list(result["loss"])
    lines = [
        "| tokens before | targets | " + " | ".join(names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    edges = result["edges"]
    for i, (low, high) in enumerate(pairwise(edges)):
        cells = " | ".join(f"{result['loss'][name][i]:.4f}" for name in names)
        lines.append(f"| {low:,}–{high:,} | {result['targets'][i]:,.0f} | {cells} |")
    cells = " | ".join(f"{result['overall'][name]:.4f}" for name in names)
    lines.append(f"| all | {sum(result['targets']):,.0f} | {cells} |")
    if "gain" in result:
        gain, trained = result["gain"], result["trained_context"]
        parts = ", ".join(f"{part} {nats:+.4f} nats" for part, nats in gain.items())
        lines += ["", f"gain over {trained:,} trained tokens: {parts}"]
    return "\n".join(lines)


def probe_table(task: str, result: dict[str, Any]) -> str:
    """Mean score of a task by length as a Markdown table, over all depths."""
    names = list(result["probes"][task])
    lines = [f"| {task}: tokens | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for i, length in enumerate(result["grid"]["lengths"]):
        rows = (result["probes"][task][name][i] for name in names)
        lines.append(f"| {length:,} | " + " | ".join(f"{np.mean(row):.3f}" for row in rows) + " |")
    return "\n".join(lines)


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return every table by the name of its file."""
    found = {"loss_by_position": table(result)} if "loss" in result else {}
    return found | {task: probe_table(task, result) for task in result.get("probes", {})}


def write(result: dict[str, Any], folder: Path) -> None:
    """Write results.json, the tables and the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    # JSON knows no nan, the mean of a place that no document reaches
    loss = {
        k: [v if v == v else None for v in values] for k, values in result.get("loss", {}).items()
    }
    stored = json.dumps(result | ({"loss": loss} if loss else {}), indent=1, allow_nan=False)
    (folder / "results.json").write_text(stored + "\n")
    for name, text in tables(result).items():
        (folder / f"{name}.md").write_text(text + "\n")
    if loss:
        figure = plots.loss_by_position(result["edges"], result["loss"], result["trained_context"])
        figure.savefig(folder / "loss_by_position.png", dpi=150)
    for task, scores in result.get("probes", {}).items():
        grid = result["grid"]
        plots.heat_map(grid["lengths"], grid["depths"], scores).savefig(
            folder / f"{task}.png", dpi=150
        )
