"""`lit_longctx evaluate`: the same tokens and prompts for every checkpoint, side by side."""

import json
from contextlib import nullcontext
from math import isfinite
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

import lit_longctx
from lit_longctx.checkpoint import Checkpoint
from lit_longctx.context_parallel import ContextParallelName, apply_context_parallel
from lit_longctx.data.sampling.conversations import Conversations
from lit_longctx.data.store.chunks import BLOCK
from lit_longctx.data.store.remote import open_folder
from lit_longctx.data.store.storage import ObjectStorage
from lit_longctx.data.store.windows import Windows
from lit_longctx.data.tokens.opening import check_tokenizer, open_tokenizer
from lit_longctx.evaluation.candidates import Candidate, open_candidates
from lit_longctx.evaluation.loss.held_out import HeldOutLoss, LossRows
from lit_longctx.evaluation.loss.longppl import KeyTokens, LongPPL
from lit_longctx.evaluation.loss.sliding import SlidingWindow, SlidingWindowPerplexity
from lit_longctx.evaluation.measure import EvalItem, Measure, Section
from lit_longctx.evaluation.processes import Processes, started_processes
from lit_longctx.evaluation.retrieval.answers import Answers
from lit_longctx.evaluation.retrieval.grid import Grid, Probe
from lit_longctx.evaluation.retrieval.prompts import Haystack
from lit_longctx.manifest import write_text
from lit_longctx.model import chosen_device
from lit_longctx.model.attention import AttnImplementation, automatic
from lit_longctx.model.layers import LayerPattern
from lit_longctx.position import PositionScheme
from lit_longctx.progress import counted
from lit_longctx.result_cache import ResultCache


def evaluate(
    checkpoint: list[str],
    data: list[str],
    output: str,
    tasks: list[str] = ["loss"],  # noqa: B006 - never changed
    window: int = 4096,
    windows: int = 32,
    loss: LossRows = LossRows(),
    sliding: SlidingWindow = SlidingWindow(),
    key_tokens: KeyTokens = KeyTokens(),
    grid: Grid = Grid(),
    positions: list[PositionScheme | LayerPattern] = [],  # noqa: B006 - never changed
    attn_implementation: AttnImplementation = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    context_parallel_size: int = 1,
    context_parallel: ContextParallelName = "zigzag",
) -> dict[str, Any]:
    """Measure checkpoints side by side; of several the first is the baseline.

    Every value is kept as soon as it is known, in OUTPUT/measurements.jsonl: started again, with
    more checkpoints or tasks too, this goes on with what is missing.

    Args:
        checkpoint: Run folders, Hugging Face folders, or Hub names (org/name, org/name@revision).
        data: Prepared folders; their held-out split is read, and needles are hidden in the first's.
        output: Folder for results.json, tables and figures.
        tasks: What to measure: `loss` by position, source and document length; `perplexity` in
            sliding windows; `longppl`, the perplexity of key tokens; exact `answers` to held-out
            conversations; or probes: passkey, needle, first_sentence, multi_key, multi_value,
            multi_query, variable_tracking, common_words, frequent_words, key_values, and
            helmet_json_kv, helmet_niah_mk_2, helmet_niah_mk_3, helmet_niah_mv.
        window: Tokens per row of the loss, and most tokens of a conversation; a multiple of 256.
        windows: Rows, or conversations, per source; spread evenly over the held-out split.
        loss: What the rows of `loss` are, and its buckets of position.
        sliding: Windows and documents of `perplexity`.
        key_tokens: Documents of `longppl`, and what its key tokens are.
        grid: Lengths and depths of the probes.
        positions: Position schemes to measure each checkpoint under, without training, beside its
            own: names such as YaRN with `init_args`, or class paths; or patterns of kinds of
            layers, with `layers` and `kinds`.
        attn_implementation: Attention back end; `auto`: varlen on CUDA in bf16 or fp16, else sdpa.
        dtype: Of weights, keys and values.
        device: `cpu`, `cuda`, or `auto` for CUDA where there is one.
        context_parallel_size: Of the processes that torchrun started, how many share each row; the
            others measure other items. Generated answers are written by every process of a group.
        context_parallel: `zigzag` or `ulysses`.

    Returns:
        What results.json holds; nothing on the processes after the first.
    """
    check_given(checkpoint, data, tasks, windows)
    with started_processes(chosen_device(device), context_parallel_size, context_parallel) as (
        processes,
        place,
    ):
        held_out = open_held_out(data, window, whole_windows="loss" in tasks)
        measures = {
            name: measure_named(name, held_out, windows, loss, sliding, key_tokens, grid)
            for name in tasks
        }
        candidates = open_candidates(checkpoint, positions)
        for start in {each.folder: each.start for each in candidates.values()}.values():
            check_vocabulary(start, held_out)
        compute = Compute(place, dtype, attn_implementation, processes)
        values = measure_candidates(candidates, measures, compute, Path(output))
        if not processes.first:
            return {}
        trained = candidates[checkpoint[0]].start.trained_context
        sections = [each.report(values[name], trained) for name, each in measures.items()]
        return write(sections, {"trained_context": trained}, Path(output))


def check_given(checkpoint: list[str], data: list[str], tasks: list[str], windows: int) -> None:
    """Raise ValueError where an argument of `evaluate` is empty."""
    for name, given in (("checkpoint", checkpoint), ("data", data), ("tasks", tasks)):
        if not given:
            raise ValueError(f"expected one {name} or more; got none")
    if windows < 1:
        raise ValueError(f"windows must be 1 or more; got {windows}")


class Compute(NamedTuple):
    """What a model runs on, and how."""

    device: str
    dtype: str
    attn_implementation: AttnImplementation
    processes: Processes = Processes()

    @property
    def resolved_attention(self) -> AttnImplementation:
        """The attention back end, or what `auto` stands for."""
        if self.attn_implementation != "auto":
            return self.attn_implementation
        return automatic(self.device, getattr(torch, self.dtype))[0]


def measure_candidates(
    candidates: dict[str, Candidate], measures: dict[str, Measure], compute: Compute, output: Path
) -> dict[str, dict[str, list[Any]]]:
    """Return values by task and column, in the order of its items; the first process keeps them."""
    eval_items = [
        (name, eval_item) for name, each in measures.items() for eval_item in each.eval_items()
    ]
    values: dict[str, dict[str, list[Any]]] = {name: {} for name in measures}
    with (
        ResultCache(output / "measurements.jsonl")
        if compute.processes.first
        else nullcontext() as held
    ):
        for column, candidate in candidates.items():
            found = measure_all(column, candidate, measures, eval_items, compute, held)
            for (name, _), value in zip(eval_items, found, strict=True):
                values[name].setdefault(column, []).append(value)
    return values


def measure_all(
    column: str,
    candidate: Candidate,
    measures: dict[str, Measure],
    eval_items: list[tuple[str, EvalItem]],
    compute: Compute,
    held: ResultCache | None,
) -> list[Any]:
    """Return a column's value of every item of every task; compute those not kept yet."""
    processes = compute.processes
    known = {
        "version": lit_longctx.__version__,
        **candidate.described(),
        "attn_implementation": compute.resolved_attention,
        "dtype": compute.dtype,
        "device": torch.device(compute.device).type,
    }
    items = [
        ({**known, "task": name, "task_version": measures[name].version, **each}, name, each)
        for name, each in eval_items
    ]
    missing = [i for i, item in enumerate(items) if held is not None and item[0] not in held]
    missing = processes.from_first(missing)
    if held is not None and len(missing) < len(items):
        kept = len(items) - len(missing)
        print(f"{column}: {kept} of {len(items)} values are in {held.path}")
    if missing:
        llama = candidate.start.load(
            compute.device,
            getattr(torch, compute.dtype),
            compute.attn_implementation,
            candidate.position,
        ).eval()
        if processes.context is not None:
            apply_context_parallel(llama, processes.context)
        rounds = processes.rounds(missing)
        for numbers in counted(rounds, column, lambda each: tokens_of(items[each[0]][2])):
            value = None
            if processes.group < len(numbers):
                _, name, eval_item = items[numbers[processes.group]]
                value = measures[name].measure(llama, eval_item)
            found = processes.from_groups(value)
            for number, each in zip(numbers, found, strict=False):  # fewer in the last round
                of, name, eval_item = items[number]
                if without_nan(each) != each:
                    raise ValueError(
                        f"{column} gives {name} that is no number at {eval_item}; leave it out, "
                        "or set --dtype float32"
                    )
                if held is not None:
                    held.add(of, each)
    return [None if held is None else held[of] for of, *_ in items]


def tokens_of(eval_item: EvalItem) -> float:
    """Tokens that an item reads: what it costs, beside others."""
    return next(
        (eval_item[name] for name in ("length", "tokens", "window") if name in eval_item), 1
    )


class HeldOut(NamedTuple):
    """Held-out splits under their folders' names."""

    documents: dict[str, Windows]
    conversations: dict[str, Conversations]


def open_held_out(folders: list[str], window: int, whole_windows: bool) -> HeldOut:
    """Open prepared folders; `whole_windows` says whether documents must fill one."""
    found = HeldOut({}, {})
    for folder in folders:
        name = Path(folder).resolve().name
        if name in (*found.documents, *found.conversations):
            raise ValueError(
                f"two data folders are named {name}; rename one or evaluate one by one"
            )
        if open_folder(folder, ObjectStorage())[0].chat:
            chats = Conversations(folder, "held_out", window)
            if not len(chats):
                raise ValueError(f"no held-out conversation of {name} fits {window} tokens")
            print(f"{name}: {chats.report()}")
            found.conversations[name] = chats
            continue
        windows = Windows(folder, "held_out", window if whole_windows else BLOCK)
        if whole_windows and not len(windows):
            raise ValueError(
                f"held-out split of {name} is shorter than a window of {window} tokens"
            )
        found.documents[name] = windows
    return found


def measure_named(
    name: str,
    held_out: HeldOut,
    windows: int,
    loss: LossRows,
    sliding: SlidingWindow,
    key_tokens: KeyTokens,
    grid: Grid,
) -> Measure:
    """Return what a task's name stands for."""
    if name == "answers":
        if not held_out.conversations:
            raise ValueError("answers needs data prepared with --chat true; got documents alone")
        return Answers(held_out.conversations, windows, grid.answers == "generated")
    if not held_out.documents:
        raise ValueError(f"{name} needs documents; got conversations alone; add their folder")
    if name == "loss":
        return HeldOutLoss(held_out.documents, windows, loss)
    if name == "perplexity":
        return SlidingWindowPerplexity(held_out.documents, sliding)
    if name == "longppl":
        return LongPPL(held_out.documents, key_tokens)
    first = next(iter(held_out.documents.values()))
    return Probe(name, grid, haystack(first, max(grid.lengths)))


def haystack(held_out: Windows, tokens: int) -> Haystack:
    """Return held-out text, twice as long as the longest prompt, to hide needles in."""
    add_bos = held_out.tokenizer.add_bos
    tokenizer = open_tokenizer(str(held_out.tokenizer_folder), add_bos=add_bos)
    return Haystack.of_tokens(tokenizer, held_out.read(0, min(held_out.tokens, 2 * tokens)))


def check_vocabulary(start: Checkpoint, held_out: HeldOut) -> None:
    """Refuse data whose tokens are not the checkpoint's, before anything is measured."""
    chats = [each.windows for each in held_out.conversations.values()]
    for source in [*held_out.documents.values(), *chats]:
        check_tokenizer(source.tokenizer, start.config.vocab_size, start.tokenizer)


def write(sections: list[Section], result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write results.json, tables and figures, print the tables; return what results.json holds."""
    folder.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for key, value in section.results.items():  # of several probes, an entry for each
            result[key] = {**result[key], **value} if key in result else value
        for name, text in section.tables.items():
            (folder / f"{name}.md").write_text(text + "\n")
        for name, figure in section.figures.items():
            figure.savefig(folder / f"{name}.png", dpi=150)
    result = without_nan(result)
    stored = json.dumps(result, indent=1, allow_nan=False)
    write_text(folder / "results.json", stored + "\n")
    print("\n\n".join(table for section in sections for table in section.tables.values()))
    print(f"wrote {folder}/results.json, tables and figures")
    return result


def without_nan(value: Any) -> Any:
    """Return what JSON can hold: it knows no nan, such as the mean where no document reaches."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value
