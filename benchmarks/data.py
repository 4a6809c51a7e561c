"""What the data path costs: preparing text, reading it as whole steps, and coming back to it.

    python benchmarks/data.py                            # 5 minutes on two cores; all parts
    python benchmarks/data.py --parts resume             # prepare, loader, resume: any of them
    python benchmarks/data.py --megabytes 2 --steps 20 --documents 2000 --rounds 1    # a look

Every measurement is a process of its own on two cores (Linux), its imports not timed. Nobody
computes on the batches: a wait is all that a step costs the loader. Text is `--input`, or Python's
standard library, a document per package. What we compare with does less: `datasets` hashes nothing
and sets nothing aside; litdata and the memory map give tokens without labels, positions or
document boundaries. Times of one process waver: compare runs of an otherwise idle machine.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from importlib.metadata import version
from importlib.util import find_spec
from itertools import cycle, islice, product
from pathlib import Path
from platform import machine, python_version
from random import Random
from tempfile import TemporaryDirectory, TemporaryFile
from types import SimpleNamespace
from typing import Any

Found = dict[str, float]
STEP = 32_768
"""Tokens per optimizer step of the loaders."""
WINDOWS = (4096, 32_768)
WORKERS = (0, 2)
VOCABULARY = 8192
"""Tokens of the BPE, trained on the input."""
LONGEST = 4096
"""Characters of the longest document that the resume part cuts from the input."""
PREPARE_GOALS = {"bytes": 2.0, "BPE": 1.2}
"""Times the speed of `datasets`."""
RESUME_GOAL = 2.0
"""Seconds to the first batch."""
WAITS = {"p50": "wait p50 ms", "p99": "p99 ms", "first": "first step s"}
FLAT = "flat.bin"
DATASETS = "datasets as in its guides"
NEEDS = {"prepare": "datasets", "loader": "moto"}
"""Package that a part compares with, beyond what we depend on."""


def prepare_ours(file: str, tokenizer: str, folder: str) -> Found:
    """Time `prepare`."""
    import lit_longctx.data.making.prepare  # noqa: F401  (before the clock runs)

    begin = time.perf_counter()
    splits = prepared(file, f"{folder}/prepared", tokenizer=tokenizer).values()
    seconds = time.perf_counter() - begin
    tokens = sum(split["text_tokens"] + split["boundary_tokens"] for split in splits)
    return {"seconds": seconds, "tokens": tokens}


def prepared(file: Path | str, folder: Path | str, **settings: Any) -> dict[str, dict[str, int]]:
    """Prepare a file without a word; return the ledger of each split."""
    from lit_longctx.data.making.prepare import prepare

    with redirect_stdout(None):
        content = prepare(str(file), str(folder), **settings)
    assert content
    return content["splits"]


def prepare_datasets(file: str, tokenizer: str, folder: str) -> Found:
    """Time `datasets` as its guides have it, with the same tokenizer opened by transformers."""
    from transformers import AutoTokenizer

    from lit_longctx.data.tokens.opening import open_tokenizer

    opened = Path(folder, "tokenizer")
    opened.mkdir()
    open_tokenizer(tokenizer).save(opened)
    coder = AutoTokenizer.from_pretrained(opened, split_special_tokens=True)

    def tokenise(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = coder(rows["text"], add_special_tokens=False, return_attention_mask=False)
        return {"ids": [[coder.bos_token_id, *i, coder.eos_token_id] for i in found["input_ids"]]}

    return mapped(file, folder, tokenise)


def prepare_arrays(file: str, tokenizer: str, folder: str) -> Found:
    """Time `datasets` with our own encoding and arrays of 16 bits: the most it can give."""
    import numpy as np

    from lit_longctx.data.tokens.opening import open_tokenizer

    def tokenise(rows: dict[str, list[str]]) -> dict[str, list[np.ndarray]]:
        coder = open_tokenizer(tokenizer)
        found = coder.encode(rows["text"])
        return {"ids": [np.concatenate([[coder.bos], i, [coder.eos]]).astype("u2") for i in found]}

    return mapped(file, folder, tokenise)


def mapped(file: str, folder: str, tokenise: Callable[..., Any]) -> Found:
    """Load, map in two processes, save."""
    import datasets

    datasets.disable_progress_bars()
    begin = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=folder)
    assert isinstance(rows, datasets.Dataset)
    found = rows.map(tokenise, batched=True, num_proc=2, remove_columns=["text"])
    found.save_to_disk(f"{folder}/saved")
    seconds = time.perf_counter() - begin
    lengths = found.data.column("ids").combine_chunks().value_lengths()
    return {"seconds": seconds, "tokens": sum(lengths.to_pylist())}


def load_ours(source: str, window: int, workers: int, steps: int) -> Found:
    """Time the steps of PretrainData."""
    from lit_longctx.data.pretraining import PretrainData, Source

    rows = STEP // window

    def make() -> Iterable[Any]:
        sources = {"text": Source(source)}
        data = PretrainData(sources, window, STEP, rows, num_workers=workers)
        return attached(data, 0, steps).train_dataloader()

    return waits(make, steps)


def load_litdata(source: str, window: int, workers: int, steps: int) -> Found:
    """Time litdata's own dataset and loader, shuffled, over the same chunk files."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"  # pyright: ignore

    def make() -> Iterable[Any]:
        dataset = StreamingDataset(
            f"{source}/train",
            cache_dir=os.environ.get("LIT_LONGCTX_CACHE"),
            item_loader=TokensLoader(block_size=window + 1),
            shuffle=True,
        )
        return StreamingDataLoader(dataset, batch_size=STEP // window, num_workers=workers)

    return waits(make, steps)


def load_memmap(source: str, window: int, workers: int, steps: int) -> Found:
    """Time windows at random places of one file of tokens, through torch's DataLoader."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader

    tokens = np.memmap(f"{source}/{FLAT}", np.uint16, "r")

    def step(number: int) -> torch.Tensor:
        starts = np.random.default_rng(number).integers(len(tokens) - window, size=STEP // window)
        return torch.from_numpy(np.stack([tokens[s : s + window + 1] for s in starts]).astype("i8"))

    def make() -> Iterable[Any]:
        numbers: Any = range(steps)
        return DataLoader(numbers, batch_size=1, num_workers=workers, collate_fn=lambda n: step(*n))

    return waits(make, steps)


def waits(make: Callable[[], Iterable[Any]], steps: int) -> Found:
    """Take steps from a loader; waits in milliseconds, without the first, and tokens per second."""
    import numpy as np

    begin = time.perf_counter()
    loader = iter(make())
    next(loader)
    times = [time.perf_counter()]
    for _ in islice(loader, steps - 1):
        times.append(time.perf_counter())
    assert len(times) == steps
    seconds = np.diff(times)
    return {
        "first": times[0] - begin,
        "p50": float(np.quantile(seconds, 0.5)) * 1e3,
        "p99": float(np.quantile(seconds, 0.99)) * 1e3,
        "rate": STEP / float(seconds.mean()),
    }


def resume(source: str, packing: Any, step: int) -> Found:
    """Time from the loader's construction to its first batch, for a run that stopped at `step`."""
    from lit_longctx.data.pretraining import PretrainData, Source

    window = WINDOWS[0]
    begin = time.perf_counter()
    data = PretrainData({"text": Source(source)}, window, STEP, packing=packing)
    attached(data, step, step + 1)
    built = time.perf_counter()
    found = next(iter(data.train_dataloader()))
    seconds = time.perf_counter() - built
    assert found.next_sample == (step + 1) * STEP // window
    return {"module": built - begin, "seconds": seconds}


def attached(data: Any, step: int, steps: int) -> Any:
    """Give a data module what it reads of Lightning's Trainer, at a step of a run of `steps`."""
    samples = step * STEP // data.window
    data.trainer = SimpleNamespace(
        world_size=1,
        global_rank=0,
        is_global_zero=True,
        max_steps=steps,
        global_step=step,
        lightning_module=SimpleNamespace(samples_consumed=samples),
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=False),
    )
    return data


MEASURES: dict[str, Callable[..., Found]] = {
    "prepare": prepare_ours,
    DATASETS: prepare_datasets,
    "datasets, our arrays": prepare_arrays,
    "ours": load_ours,
    "litdata": load_litdata,
    "memory map": load_memmap,
    "resume": resume,
}


def fresh(
    name: str, environment: Mapping[str, str] = {}, watch: bool = False, **given: Any
) -> Found:
    """Run a measure in a new process; `watch` adds its peak memory, which costs some speed."""
    command = [sys.executable, __file__, "--measure", name, json.dumps(given)]
    with TemporaryFile() as out, TemporaryFile() as err:
        around = {**os.environ, **environment}
        process = subprocess.Popen(command, stdout=out, stderr=err, env=around)
        peak = 0.0
        while watch and process.poll() is None:  # ru_maxrss knows only the largest child
            peak = max(peak, memory(process.pid))
            time.sleep(0.02)
        failed = process.wait()
        for file in (out, err):
            file.seek(0)
        if failed:
            raise RuntimeError(f"{name} {given} failed:\n{err.read().decode()}")
        return {**json.loads(out.read().splitlines()[-1]), "mib": peak}


def memory(process: int) -> float:
    """MiB of a process and all below it; a page that several share counts once (Linux's PSS)."""
    kib, waiting = 0, [process]
    while waiting:
        place = Path(f"/proc/{waiting.pop()}")
        with suppress(OSError, LookupError):  # it may end while we look
            pss = (place / "smaps_rollup").read_text().split("\nPss:")[1]
            kib += int(pss.split()[0])
            for children in place.glob("task/*/children"):
                waiting += map(int, children.read_text().split())
    return kib / 1024


def texts(input: str, megabytes: float) -> Iterator[str]:
    """Yield documents until they have so many megabytes of UTF-8; again from the first if need be.

    `stdlib` gives a document per package of Python's standard library.
    """
    from lit_longctx.data.reading.documents import DocumentReader, Faults

    left = megabytes * 1e6
    for document in cycle(DocumentReader().documents([input], Faults(1.0))):
        yield document.text
        left -= len(document.text.encode())
        if left <= 0:
            return


def texts_of(file: Path) -> list[str]:
    return [json.loads(row)["text"] for row in file.open()]


def write_rows(file: Path, documents: Iterable[str]) -> None:
    with open(file, "w") as rows:
        for text in documents:
            rows.write(json.dumps({"text": text}) + "\n")


def train_bpe(documents: Iterable[str], folder: Path) -> None:
    """Write a byte-level BPE with its config."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe: Any = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    special, alphabet = ["<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    named = dict(zip(("bos_token", "eos_token"), special, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def report_prepare(file: Path, options: argparse.Namespace) -> Iterator[str]:
    """Compare `prepare` with `datasets`, in turns; memory is watched in a run that is not timed."""
    documents = texts_of(file)
    megabytes = sum(len(text.encode()) for text in documents) / 1e6
    train_bpe(documents, file.parent / "bpe")
    rows, verdicts = [], []
    for coder, name in (("bytes", "bytes"), ("BPE", str(file.parent / "bpe"))):
        found: dict[str, list[Found]] = {who: [] for who in list(MEASURES)[:3]}
        for turn, who in product(range(options.rounds + 1), found):
            with TemporaryDirectory(dir=file.parent) as folder:
                given = {"file": str(file), "tokenizer": name, "folder": folder}
                found[who] += [
                    fresh(who, {"HF_HOME": folder, "HF_HUB_OFFLINE": "1"}, watch=not turn, **given)
                ]
        assert len({run["tokens"] for runs in found.values() for run in runs}) == 1
        best = {who: min(run["seconds"] for run in runs[1:]) for who, runs in found.items()}
        for who, (watched, *_) in found.items():
            rates = f"{megabytes / best[who]:,.1f}", f"{watched['tokens'] / best[who]:,.0f}"
            rows.append([coder, who, *rates, f"{watched['mib']:,.0f}"])
        for who in list(found)[1:]:
            ratio, goal = best[who] / best["prepare"], PREPARE_GOALS[coder]
            verdicts += verdict(ratio >= goal, f"{coder} {ratio:.2f} × {who}, goal {goal} ×")
    head = ["tokenizer", "by", "MB/s", "tokens/s", "peak MiB"]
    yield table(f"Prepare: {megabytes:,.1f} MB in {len(documents):,} documents", head, rows)
    yield from verdicts
    yield (
        f"\nBest of {options.rounds}. Memory: proportional set sizes (shared pages count once) of "
        "the process and all below it, imports included, summed every 20 ms of one more run."
    )


def report_loader(file: Path, options: argparse.Namespace) -> Iterator[str]:
    """Compare loaders on disk and over S3, whose server has the same two cores."""
    local = file.parent / "loader"
    epoch = prepared_for_loaders(file, local)
    if epoch < 10:
        raise ValueError(
            f"input holds {epoch} steps of {STEP} tokens; raise --megabytes to 1 or more"
        )
    steps, rows = min(options.steps, epoch), []
    with object_storage(local) as url:
        places = [("disk", str(local)), ("S3", url)]
        for window, workers, (place, source) in product(WINDOWS, WORKERS, places):
            for who in ["ours", "litdata", *["memory map"] * (place == "disk")]:
                given = {"source": source, "window": window, "workers": workers, "steps": steps}
                with TemporaryDirectory(dir=file.parent) as cache:
                    around = {"LIT_LONGCTX_CACHE": cache, "OMP_NUM_THREADS": "1"}
                    found = fresh(who, around, **given)
                numbers = [f"{found['rate']:,.0f}", *(f"{found[k]:.2f}" for k in WAITS)]
                rows.append([f"{window:,}", str(workers), place, who, *numbers])
    head = ["window", "workers", "from", "by", "tokens/s", *WAITS.values()]
    yield table(f"Loader: {steps} steps of {STEP:,} tokens", head, rows)
    yield (
        "\nTokens/s and waits without the first step; from S3, the cache is empty before it. One "
        "thread per process, as torch gives loader workers: two wait for each other on busy cores."
    )


def prepared_for_loaders(file: Path, folder: Path) -> int:
    """Prepare bytes, and the same tokens as one flat file; steps that litdata finds in them."""
    import numpy as np

    from lit_longctx.data.store.windows import Windows

    prepared(file, folder, held_out=0.0)
    stream = Windows(folder, "train", WINDOWS[0])
    stream.read(0, stream.tokens).astype(np.uint16).tofile(folder / FLAT)
    chunks = json.loads((folder / "train" / "index.json").read_text())["chunks"]
    # it drops what does not fill a window at the end of a chunk, and ends on smaller batches
    return min(sum(c["dim"] // (w + 1) for c in chunks) * w // STEP for w in WINDOWS) - 4


def report_resume(file: Path, options: argparse.Namespace) -> Iterator[str]:
    """Time resuming within an epoch of many short documents."""
    folder, short = file.parent / "resume", file.parent / "short.jsonl"
    write_rows(short, islice(cut(cycle(texts_of(file))), options.documents))
    train = prepared(short, folder, held_out=0.0)["train"]
    rows, verdicts = [], []
    for packing, share in product(("concatenate", "best_fit"), (0.1, 0.9)):
        given = {"packing": packing, "step": int(share * train["tokens"] / STEP)}
        runs = [fresh("resume", source=str(folder), **given) for _ in range(options.rounds)]
        seconds, module = (max(run[k] for run in runs) for k in ("seconds", "module"))
        rows.append([packing, f"{share:.0%}", f"{seconds:.3f}", f"{module:.3f}"])
        text = f"{packing} at {share:.0%} after {seconds:.2f} s, goal {RESUME_GOAL} s"
        verdicts += verdict(seconds <= RESUME_GOAL, text)
    head = ["packing", "of an epoch", "loader to first batch, s", "data module before it, s"]
    size = f"{train['documents']:,} documents, {train['tokens']:,} tokens"
    yield table(f"Resume: {size}, window {WINDOWS[0]:,}, workers 0", head, rows)
    yield from verdicts
    yield f"\nSlowest of {options.rounds} new processes; files are in the system's page cache."


def cut(documents: Iterable[str]) -> Iterator[str]:
    """Yield texts in pieces of random length."""
    lengths = Random(0)
    for text in documents:
        at = 0
        while at < len(text):
            length = lengths.randint(1, LONGEST)
            if not text[at : at + length].isspace():
                yield text[at : at + length]
            at += length


@contextmanager
def object_storage(folder: Path) -> Iterator[str]:
    """Serve a folder by moto's S3 server on loopback, and yield its URL.

    Its address and credentials stay in the environment, for the processes that measure.
    """
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "fake")
    os.environ |= {
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    os.environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until_it_answers(server, int(port))
        client = boto3.client("s3")
        client.create_bucket(Bucket="tokens")
        for path in folder.rglob("*"):
            if path.is_file() and path.name != FLAT:
                client.upload_file(str(path), "tokens", f"text/{path.relative_to(folder)}")
        yield "s3://tokens/text"
    finally:
        server.terminate()
        server.wait()


def until_it_answers(server: subprocess.Popen[bytes], port: int) -> None:
    for _ in range(300):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert server.poll() is None
        time.sleep(0.1)
    raise RuntimeError(f"the S3 server on port {port} does not answer")


def verdict(reached: bool, text: str) -> list[str]:
    return [f"- {'pass' if reached else 'short'}: {text}"]


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return f"\n## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


REPORTS = {"prepare": report_prepare, "loader": report_loader, "resume": report_resume}


def report(options: argparse.Namespace) -> Iterator[str]:
    """Measure and yield the Markdown, part by part."""
    names = ["lit_longctx", "litdata", "tokenizers"]
    for part in options.parts:
        if package := NEEDS.get(part):
            if not find_spec(package):
                raise ValueError(
                    f"part {part} needs the package {package}; pip install 'lit_longctx[dev]'"
                )
            names.append(package)
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    cores = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, cores)  # new processes inherit it
    yield f"# Data path: {versions}, Python {python_version()}, {machine()} with {len(cores)} cores"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "text.jsonl"
        write_rows(file, texts(options.input, options.megabytes))
        if not file.stat().st_size:
            raise ValueError(f"input {options.input} holds no document; name one with a text field")
        for part in options.parts:
            yield from REPORTS[part](file, options)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of preparing, loading and resuming")
    parser.add_argument("--parts", nargs="+", choices=REPORTS, default=list(REPORTS))
    parser.add_argument("--input", default="stdlib", help="jsonl, .gz or .zst; default: Python's")
    parser.add_argument("--megabytes", type=float, default=48.0, help="of text taken from it")
    parser.add_argument("--steps", type=int, default=300, help="that each loader takes")
    parser.add_argument("--documents", type=int, default=100_000, help="of the resume part")
    parser.add_argument(
        "--rounds", type=int, default=2, help="timed runs of preparing and resuming, 1 or more"
    )
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, given = options.measure
        print(json.dumps(MEASURES[name](**json.loads(given))))
        return
    parts = []
    try:
        for part in report(options):
            print(part, flush=True)
            parts.append(part)
    except ValueError as error:
        sys.exit(str(error))
    if options.output:
        options.output.write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
