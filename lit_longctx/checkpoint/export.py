"""Write a model as a Hugging Face folder."""

import json
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch

from lit_longctx import manifest
from lit_longctx import position as schemes
from lit_longctx.checkpoint import hugging_face, parameters, readers
from lit_longctx.checkpoint.companions import GENERATION, TOKENS, Companions
from lit_longctx.checkpoint.families import FAMILIES
from lit_longctx.checkpoint.opening import Checkpoint, open_checkpoint
from lit_longctx.checkpoint.verification import steps_of
from lit_longctx.model import Llama
from lit_longctx.progress import say


def export_pretrained(
    llama: Llama,
    folder: str | Path,
    tokenizer: Any = None,
    context: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a Hugging Face folder that transformers 4 and 5 read as the same model.

    Tokenizer, chat template, special tokens and generation config are those of the checkpoint that
    the model was loaded from, and of its start before that. The files' hashes stand in
    manifest.json, which loading compares.

    Args:
        llama: The model; sharded parameters are gathered one at a time.
        folder: Where to; must not exist. Appears whole or not at all.
        tokenizer: A folder to copy tokenizer files from, or an object with `.save(folder)`, in
            place of the checkpoint's.
        context: The new max_position_embeddings; default: the largest of the checkpoint's context,
            what was trained, and the scheme's reach (factor × original context).
        dtype: Of the stored weights.

    Raises:
        ValueError: for a position scheme that Hugging Face cannot represent, and for weights that
            are no finite numbers in `dtype`.
    """
    start: Checkpoint | None = llama.start
    if start and not start.path.is_dir():
        say(f"{start.path}, from which the model was loaded, is gone: nothing is taken from there")
    beside = start.companions if start else Companions()
    if isinstance(tokenizer, str | Path):
        beside = replace(beside, given=Path(tokenizer))
    tokens = start.tokens if start else {}
    context = context or context_of(llama)[0]
    config = hugging_face.config_json(llama, context, dtype) | tokens
    if config["model_type"] != llama.config.model_type:
        say(f"{folder}: written as {config['model_type']}, which has layers such as the model's")
    with manifest.whole_folder(Path(folder)) as temporary:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        parameters.save(llama, temporary, dtype, FAMILIES[config["model_type"]].norm_offset)
        save = getattr(tokenizer, "save", None)
        if save:
            save(temporary)
        beside.write(temporary, tokenizer=not save)
        generation = beside.generation({key: config.get(key) for key in TOKENS})
        (temporary / GENERATION).write_text(json.dumps(generation, indent=2) + "\n")
        hugging_face.compare_with_transformers(temporary, llama)
        for line in readers.check(config):
            say(f"{folder}: {line}")
        manifest.seal(temporary, manifest.hash_files(temporary))
    return Path(folder)


def context_of(llama: Llama) -> tuple[int, str]:
    """Return the context of a model, and what decides it."""
    if llama.start is not None:
        return llama.start.context_with(llama.layers)
    reach, configured = llama.layers.reach(0), llama.config.max_position_embeddings
    if any(isinstance(kind.position, schemes.YaRN) for kind in llama.layers.kinds):
        return reach  # no other fits it; the config's may be no more than the default
    return max((configured, "the config's"), reach, key=itemgetter(0))


def export(
    checkpoint: str,
    output: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    context: int | None = None,
    average: int = 1,
) -> Path:
    """Write a run's newest checkpoint as a Hugging Face folder.

    Args:
        checkpoint: Run folder, or one of its checkpoints.
        output: Folder to make; must not exist.
        dtype: Of the stored weights.
        context: Tokens of context to write as max_position_embeddings; default: the largest of the
            start's, the longest that was trained, and the position scheme's reach.
        average: Checkpoints of the run whose weights are averaged: the newest, or the one that is
            named, and those before it (latest weight averaging; Kaddour 2022, arXiv:2209.14981).

    Raises:
        ValueError: The run has fewer whole checkpoints of these layers.
    """
    opened = open_checkpoint(checkpoint).verified()
    others = _before(opened, average - 1)
    llama = opened.load()
    _average(llama, opened, others)
    told = (context, "as given") if context else context_of(llama)
    export_pretrained(llama, output, None, context, getattr(torch, dtype))
    written = json.loads((Path(output) / "config.json").read_text())["max_position_embeddings"]
    if written != told[0]:
        told = (written, "the original: transformers stretches positions from there")
    print(f"{llama.layers}")
    print(f"context {told[0]:,}: {told[1]}")
    beside = opened.companions
    print(f"tokenizer from {beside.tokenizer}, chat template from {beside.chat_template}")
    print(f"wrote {output}")
    return Path(output)


def _before(newest: Checkpoint, number: int) -> list[Checkpoint]:
    """Return as many checkpoints of a run just before one of them, of the same model."""
    if number < 0:
        raise ValueError(f"average {number + 1} must be 1 or more")
    if number == 0:
        return []
    steps = [step for step in steps_of(newest.path.parent) if step.name < newest.path.name]
    if len(steps) < number or not parameters.is_run(newest.path):
        raise ValueError(
            f"{newest.path} has {len(steps)} checkpoints before it, expected {number} for "
            f"average {number + 1}; export fewer, or train with a larger checkpoints.keep"
        )
    others = [open_checkpoint(step).verified() for step in steps[:number]]
    for other in others:
        if (other.config, other.layers) != (newest.config, newest.layers):
            raise ValueError(
                f"{other.path} has {other.layers}, {newest.path.name} {newest.layers}; average "
                "fewer"
            )
    return others


@torch.no_grad()
def _average(llama: Llama, newest: Checkpoint, others: list[Checkpoint]) -> None:
    """Replace weights by their mean over the model and other checkpoints of its run."""
    for count, other in enumerate(others, 2):
        read = dict(other.load().named_parameters())
        for name, weight in llama.named_parameters():
            weight.lerp_(read[name], 1 / count)
    if others:
        say(f"weights: mean of {', '.join(each.path.name for each in (newest, *others))}")
