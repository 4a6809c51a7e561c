"""Runs of the command line that several test files start, and callbacks that watch them.

`ModelParallelStrategy` would start pytest again on every rank, and importing torch and Lightning
takes seconds; so runs are forked from a process that has imported both, or started as scripts.
"""

import atexit
import fcntl
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_longctx.batch import StepBatch

P, T = ParamSpec("P"), TypeVar("T")
WINDOW = 256
BATCH = 8
"""Windows per optimizer step."""
PRELOADED = ["lit_longctx.training.fit", "lit_longctx.evaluation.evaluate", "lit_longctx.generate"]
TIMEOUT = 240
"""Seconds after which a run is taken to hang: many times what it takes on a busy machine."""
PORTS = range(20_000, 30_000)
"""Below those that systems give to whoever asks for any."""


# ---- data and configs


@cache
def workshop() -> Path:
    """Folder that the runs of this session share; pytest's workers all have the same."""
    if session := os.environ.get("PYTEST_XDIST_TESTRUNUID"):
        folder = Path(tempfile.gettempdir()) / f"lit_longctx-{session}"
        folder.mkdir(exist_ok=True)  # conftest.py removes it when all workers have ended
        return folder
    folder = Path(tempfile.mkdtemp(prefix="lit_longctx-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def shared(make: Callable[P, T]) -> Callable[P, T]:
    """Call a function once in a session; the workers that come later read what it returned.

    Once for each of its arguments, which must be hashable, and whose text belongs to a file's name.
    """

    @cache
    def made(*given: P.args, **named: P.kwargs) -> T:
        file = workshop() / f"{'-'.join(map(str, (make.__name__, *given)))}.pickle"
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                file.write_bytes(pickle.dumps(make(*given, **named)))
        return pickle.loads(file.read_bytes())

    return cast(Callable[P, T], made)


def documents(seed: int, number: int) -> list[str]:
    """Texts of 10 to 500 characters, such that windows differ in their number of targets."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 7))) for _ in range(30)]
    return [" ".join(rng.choices(words, k=rng.randint(3, 100))) for _ in range(number)]


def prepare(folder: Path, texts: Sequence[str], **options: Any) -> Path:
    """Write a prepared data folder."""
    from lit_longctx.data.making.prepare import prepare as prepare_documents

    rows = folder.with_suffix(".jsonl")
    named = [{"id": f"{folder.name} {i}", "text": text} for i, text in enumerate(texts)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in named))
    options = {"held_out": 0.2, "chunk_tokens": 4096, **options}
    prepare_documents([str(rows)], str(folder), **options)
    return folder


@shared
def sources() -> dict[str, dict[str, Any]]:
    """Two prepared folders, one drawn three times as often as its share."""
    parts = {"prose": (1, 450, 0.75), "code": (2, 300, 0.25)}
    return {
        name: {"folder": str(prepare(workshop() / name, documents(seed, number))), "weight": weight}
        for name, (seed, number, weight) in parts.items()
    }


@shared
def config() -> Path:
    """A YAML file for a tiny Llama on two sources; float32, deterministic."""
    shape = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": WINDOW}
    model = {
        "config": {**shape, **heads, "bos_token_id": 256, "eos_token_id": 257},
        "learning_rate": 3e-3,
        "compute_dtype": "float32",
        "schedule": {"class_path": "WarmupCosine", "init_args": {"warmup_steps": 5}},
    }
    data = {
        "sources": sources(),
        "window": WINDOW,
        "batch_tokens": BATCH * WINDOW,
        "micro_batch_size": 4,
        "held_out_windows": 5,
    }
    trainer = {"accelerator": "cpu", "deterministic": True}
    length = {"max_steps": 30, "val_check_interval": 10}
    content = {
        "model": {"class_path": "ContinualPretrain", "init_args": model},
        "data": {"class_path": "PretrainData", "init_args": data},
        "trainer": trainer | length,
        "checkpoints": {"every_n_steps": 10, "keep": 9},
    }
    path = workshop() / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


# ---- starting


class Ran(NamedTuple):
    """What came of a run."""

    code: int
    out: str
    err: str
    folder: Path

    def succeeded(self) -> "Ran":
        assert self.code == 0, self.err
        return self


class Running:
    """A run on its way, one process per rank, each in a process group of its own."""

    def __init__(self, arguments: Sequence[Any], folder: Path, ranks: int = 1) -> None:
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(PRELOADED)
        self.folder = folder
        self.logs = Path(tempfile.mkdtemp(dir=workshop()))
        port = free_port()
        self.processes: list[BaseProcess] = []
        for rank in range(ranks):
            launcher = launched_as(rank, ranks, port) if ranks > 1 else {}
            given = [str(argument) for argument in arguments]
            environment = {**os.environ, **launcher}
            process = forks.Process(
                target=command, args=(given, self.logs / str(rank), environment)
            )
            process.start()
            self.processes.append(process)

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """SIGKILL every rank with its loader workers."""
        for process in self.processes:
            assert process.pid is not None
            try:
                os.killpg(process.pid, 9)
            except ProcessLookupError:  # over, or so young that it has no group yet
                process.kill()
            process.join()

    def wait(self, timeout: float = TIMEOUT) -> Ran:
        """Return when all ranks have ended; the worst exit code counts."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hung = any(process.is_alive() for process in self.processes)
        self.kill()
        out, err = self.output("out"), self.output("err")
        assert not hung, f"run hangs: {out} {err}"
        worst = max(abs(process.exitcode or 0) for process in self.processes)
        return Ran(worst, out, err, self.folder)

    def output(self, name: str) -> str:
        ranks = range(len(self.processes))
        return "".join(Path(f"{self.logs / str(rank)}.{name}").read_text() for rank in ranks)


def command(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """Run the command line in this fresh process, its output in files."""
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT), number)
    # more would wait for each other in busy loops, and Lightning sets what is left open
    os.environ.update(environment, OMP_NUM_THREADS="1")
    # as they would be in a process started by hand
    rank_zero_only.rank = int(environment.get("RANK", 0))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by a shell's background jobs
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    from lit_longctx.cli import main

    sys.exit(main(arguments))


LOCKS: list[IO[bytes]] = []


def free_port() -> int:
    """Return a port that no other process of tests, on this machine, is given meanwhile.

    One that is only found free may be another's by the time that it is opened.
    """
    folder = Path(tempfile.gettempdir()) / f"lit_longctx-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    for port in random.Random(os.getpid()).sample(PORTS, len(PORTS)):
        lock = (folder / str(port)).open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            lock.close()
            continue
        LOCKS.append(lock)  # until this process ends
        return port
    raise AssertionError(f"none of {PORTS} is free")


def launched_as(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the variables by which torchrun tells a process its place."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks}
    world = {"LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables = {**place, **world, "TORCHELASTIC_RUN_ID": "none"}
    return {name: str(value) for name, value in variables.items()}


def run(*arguments: Any, folder: Path | None = None, ranks: int = 1) -> Ran:
    """Run the command line to its end."""
    return Running(arguments, folder or workshop(), ranks).wait()


def fitting(folder: Path, *arguments: Any) -> list[Any]:
    """Return the arguments that train the tiny Llama in a run folder, witnessed."""
    return [
        *("fit", "--config", config(), "--trainer.default_root_dir", folder),
        *("--trainer.callbacks+", "training.runs.Ragged"),
        *("--trainer.callbacks+", "training.runs.Witness", *arguments),
    ]


def fit(folder: Path, *arguments: Any, ranks: int = 1) -> Ran:
    """Train the tiny Llama in a run folder."""
    return run(*fitting(folder, *arguments), folder=folder, ranks=ranks)


def torchrun(
    ranks: int,
    arguments: Sequence[Any],
    folder: Path,
    options: Sequence[str] = (),
    then: Callable[[subprocess.Popen[bytes]], None] = lambda _: None,
) -> Ran:
    """Start a run as a user does, by torchrun; its output goes to a file."""
    launch = f"-m torch.distributed.run --standalone --nproc_per_node {ranks}".split()
    return as_script([*launch, *options], arguments, folder, then)


def as_script(
    launch: Sequence[str],
    arguments: Sequence[Any],
    folder: Path,
    then: Callable[[subprocess.Popen[bytes]], None],
) -> Ran:
    """Start the command line as a user does, and do something to it once it has begun."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "LOCAL_"))}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    log = Path(tempfile.mkdtemp(dir=workshop())) / "script"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *launch, "-m", "lit_longctx.cli", *map(str, arguments)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            then(process)
            code = process.wait(TIMEOUT)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
    return Ran(code, log.read_text(), "", folder)


@shared
def alone() -> Ran:
    """30 uninterrupted steps on one process, with checkpoints at 10, 20 and 30."""
    return fit(workshop() / "alone").succeeded()


@shared
def together() -> Ran:
    """Train the same on two processes."""
    return fit(workshop() / "together", ranks=2).succeeded()


@shared
def by_torchrun() -> Ran:
    """Train the same on two processes that torchrun starts, as a user does."""
    folder = workshop() / "by_torchrun"
    ran = torchrun(2, fitting(folder), folder)
    assert ran.code == 0, ran.out
    return ran


def stored(folder: Path) -> dict[str, Any]:
    """Return all that a checkpoint holds, by torch's own reader."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as place:
        dcp_to_torch_save(folder, Path(place) / "state.pt")
        return torch.load(Path(place) / "state.pt", weights_only=True)


# ---- watching


NUMBERS = ("loss", "grad_norm", "lr", "tokens")


class Ragged(Callback):
    """Weighs rows by their sample number, every third with 0, so that ranks differ in weight."""

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: StepBatch, i: int
    ) -> None:
        for micro in batch.micro_batches:
            micro.loss_weights.mul_((micro.samples % 3).unsqueeze(1))


class Witness(Callback):
    """Writes down each step's loss and what this rank read, as a line of JSON in the run folder."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = (folder / f"witness-{trainer.global_rank}.jsonl").open("a", buffering=1)
        self.write(resumed=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: StepBatch, i: int
    ) -> None:
        seen = trainer.callback_metrics
        rows = [row for micro in batch.micro_batches for row in described(micro)]
        values = {name: float(seen[f"train/{name}"]) for name in NUMBERS}
        self.write(step=trainer.global_step, rows=rows, **values)

    def write(self, **entry: Any) -> None:
        self.file.write(json.dumps(entry) + "\n")


def described(batch: Any) -> list[tuple[int, int, int, str]]:
    """Return sample number, source, weight and a hash of the tokens of each row."""
    numbers = zip(batch.samples.tolist(), batch.sources.tolist(), strict=True)
    weights = batch.loss_weights.sum(dim=1).int().tolist()
    tokens = torch.stack([batch.input_ids, batch.labels, batch.position_ids], dim=1).numpy()
    hashes = [hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in tokens]
    return [(*n, w, h) for n, w, h in zip(numbers, weights, hashes, strict=True)]


class Entry(NamedTuple):
    """What a run saw and found in one step, over all ranks."""

    rows: list[tuple[int, int, int, str]]
    loss: float
    grad_norm: float
    lr: float
    tokens: float


def witnessed(folder: Path) -> dict[int, Entry]:
    """Read the witnesses of all ranks; what a later restart undid does not count."""
    entries: dict[int, Entry] = {}
    for file in sorted(folder.glob("witness-*.jsonl")):
        mine: dict[int, dict[str, Any]] = {}
        for line in map(json.loads, file.read_text().splitlines()):
            if "resumed" in line:
                mine = {step: entry for step, entry in mine.items() if step <= line["resumed"]}
            else:
                step = line.pop("step")
                assert step not in mine, f"step {step} twice in {file}"
                mine[step] = line
        for step, entry in mine.items():
            rows = [tuple(row) for row in entry.pop("rows")]
            before = entries[step].rows if step in entries else []
            entries[step] = Entry(before + rows, **entry)
    return entries


def samples(entries: dict[int, Entry]) -> list[list[tuple[int, int, int, str]]]:
    """Return what each step read, in order of steps."""
    return [entries[step].rows for step in sorted(entries)]


def losses(entries: dict[int, Entry]) -> list[float]:
    """Return each step's loss, in order of steps."""
    return [entries[step].loss for step in sorted(entries)]


def largest_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a run's TensorBoard scalars: name → [(step, value)]."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


class Leash(Callback):
    """Lets a run make so many steps and then wait for the kill, however late that comes."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.end = trainer.global_step + self.steps

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: StepBatch, i: int
    ) -> None:
        if trainer.global_step >= self.end:
            signal.pause()


class StopAfter(Callback):
    """Ends a run early, with a checkpoint, as if it had been planned."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: StepBatch, i: int
    ) -> None:
        trainer.should_stop = trainer.global_step >= self.step


class Poison(Callback):
    """Turns one rank's loss into NaN at one step, and says whether its weights outlived it."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: StepBatch, i: int
    ) -> None:
        self.before = [p.detach().clone() for p in module.parameters()]
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            batch.micro_batches[0].loss_weights.fill_(float("nan"))

    def on_exception(
        self, trainer: Trainer, module: LightningModule, exception: BaseException
    ) -> None:
        pairs = zip(self.before, module.parameters(), strict=True)
        same = all(torch.equal(old.to_local(), new.to_local()) for old, new in pairs)
        print(f"rank {trainer.global_rank} step {trainer.global_step} weights same {same}")


# ---- inside pytest


@contextmanager
def own_process_group() -> Iterator[None]:
    """Leave no process group and none of Lightning's variables behind."""
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = "1"  # or Lightning would set the number of threads for good
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def quiet_trainer(folder: Path, steps: int, callbacks: list[Callback]) -> Trainer:
    """Return a trainer of one process under FSDP2, in this process."""
    from lit_longctx.training.parallel import FSDP2Strategy

    return Trainer(
        accelerator="cpu",
        devices=1,
        strategy=FSDP2Strategy(),
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def whole_weights(module: LightningModule) -> dict[str, torch.Tensor]:
    """Return a copy of all weights, gathered from their shards."""
    return {n: p.detach().full_tensor().clone() for n, p in module.named_parameters()}
