"""A run that was cut off goes on as if it had not been."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import figure
from thorough import thorough
from training import runs

from lit_longctx import manifest
from lit_longctx.checkpoint import load_pretrained, newest_whole

START = 10
"""Step whose checkpoint the runs here go on from; 20 more follow."""


def resume(folder: Path, start: runs.Ran, *options: Any, ranks: int = 1) -> dict[int, runs.Entry]:
    """Go on from another run's step 10 and return what was seen from step 11 on."""
    checkpoint = start.folder / "checkpoints" / f"step-{START:08d}"
    ran = runs.fit(folder, "--ckpt_path", checkpoint, *options, ranks=ranks).succeeded()
    assert ran.err == ""
    assert ran.out.count(f"going on from {checkpoint}") == 1
    return runs.witnessed(folder)


def after_start(ran: runs.Ran) -> dict[int, runs.Entry]:
    return {step: e for step, e in runs.witnessed(ran.folder).items() if step > START}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_same_layout_goes_on_equal_in_every_digit(workers: int, tmp_path: Path):
    found = resume(tmp_path, runs.alone(), "--data.init_args.num_workers", workers)
    assert found == after_start(runs.alone())
    ours, uninterrupted = (load_pretrained(f) for f in (tmp_path, runs.alone().folder))
    for name, weight in uninterrupted.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    held_out, expected = (runs.scalars(f)["val/loss"] for f in (tmp_path, runs.alone().folder))
    assert held_out == expected[1:]


@pytest.mark.slow
def test_same_layout_of_two_processes_goes_on_equal_in_every_digit(tmp_path: Path):
    assert resume(tmp_path, runs.together(), ranks=2) == after_start(runs.together())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "ranks", "micro_batch_size", "workers"),
    [
        pytest.param(2, 1, 4, 0, id="2 processes to 1"),
        pytest.param(1, 2, 4, 2, id="1 process to 2 with loader workers"),
        pytest.param(1, 1, 1, 0, id="micro-batches of 1"),
        pytest.param(1, 1, 8, 2, id="micro-batches of 8 with loader workers"),
        pytest.param(2, 1, 3, 0, id="micro-batches of 3, 3 and 2"),
    ],
)
def test_other_layout_goes_on_with_the_same_samples_and_losses(
    before: int, ranks: int, micro_batch_size: int, workers: int, tmp_path: Path
):
    start = runs.alone() if before == 1 else runs.together()
    layout = ("micro_batch_size", micro_batch_size), ("num_workers", workers)
    options = [part for key, value in layout for part in (f"--data.init_args.{key}", value)]
    found = resume(tmp_path, start, *options, ranks=ranks)
    expected = after_start(runs.alone())
    assert runs.samples(found) == runs.samples(expected)
    difference = runs.largest_difference(runs.losses(found), runs.losses(expected))
    figure(f"{before} to {ranks} processes, micro-batch {micro_batch_size}: {difference:.0e}")
    assert difference <= 1e-6


@pytest.mark.slow
def test_blocks_recomputed_in_backward_go_on_with_the_same_losses(tmp_path: Path):
    found = resume(tmp_path, runs.alone(), "--model.init_args.recompute", "block")
    expected = after_start(runs.alone())
    assert runs.largest_difference(runs.losses(found), runs.losses(expected)) <= 1e-6
    ours, plain = (load_pretrained(f).state_dict() for f in (tmp_path, runs.alone().folder))
    assert ours.keys() == plain.keys()
    for name, weight in plain.items():
        assert (ours[name] - weight).abs().max() <= 1e-4 * weight.abs().max(), name


@pytest.mark.slow
def test_compiled_blocks_go_on_with_the_same_losses(tmp_path: Path):
    checkpoint = runs.alone().folder / "checkpoints" / f"step-{START:08d}"
    compiled = ["--model.init_args.compile", "true"]
    # the compiler logs to stderr what it recompiles
    runs.fit(tmp_path, "--ckpt_path", checkpoint, *compiled).succeeded()
    expected = after_start(runs.alone())
    found = runs.losses(runs.witnessed(tmp_path))
    difference = runs.largest_difference(found, runs.losses(expected))
    print(f"compiled: loss differs by {difference:.1e}")
    assert difference <= 1e-5


@pytest.mark.slow
def test_another_batch_size_goes_on_with_the_next_sample(tmp_path: Path):
    found = resume(tmp_path, runs.alone(), "--data.init_args.batch_tokens", 4 * runs.WINDOW)
    rows = [row for step in runs.samples(found) for row in step]
    same = [row for step in runs.samples(after_start(runs.alone())) for row in step]
    assert rows == same[: len(rows)]
    assert len(rows) == 4 * 20
    assert found[30].tokens == (80 + 80) * runs.WINDOW


@pytest.mark.slow
def test_an_older_checkpoint_of_the_same_run_is_refused(tmp_path: Path):
    """Else `last` would afterwards go on from the newer ones, which were given up."""
    folder = Path(shutil.copytree(runs.alone().folder, tmp_path / "run"))
    checkpoint = folder / "checkpoints" / f"step-{START:08d}"
    ran = runs.fit(folder, "--ckpt_path", checkpoint)
    assert ran.code == 1
    assert ran.err.startswith(
        f"lit_longctx: error: {checkpoint} has newer checkpoints beside it, up to step-00000030"
    )
    shutil.rmtree(folder / "checkpoints" / "step-00000020")
    (folder / "checkpoints" / "step-00000030" / "model.json").unlink()  # a torn one is none
    runs.fit(folder, "--ckpt_path", checkpoint).succeeded()
    assert runs.witnessed(folder) == runs.witnessed(runs.alone().folder)


@pytest.mark.slow
def test_last_in_an_empty_folder_begins(tmp_path: Path):
    ran = runs.fit(tmp_path, "--ckpt_path", "last", "--trainer.max_steps", 5).succeeded()
    assert f"{tmp_path / 'checkpoints'} holds no checkpoint yet: starting anew" in ran.out
    beginning = {step: runs.witnessed(runs.alone().folder)[step].rows for step in range(1, 6)}
    assert {step: e.rows for step, e in runs.witnessed(tmp_path).items()} == beginning


@pytest.mark.slow
def test_last_of_a_finished_run_changes_nothing(tmp_path: Path):
    folder = shutil.copytree(runs.alone().folder, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (folder / "checkpoints").rglob("*")}
    runs.fit(folder, "--ckpt_path", "last").succeeded()
    assert {p: p.stat().st_mtime_ns for p in (folder / "checkpoints").rglob("*")} == before
    assert sorted(runs.witnessed(folder)) == list(range(1, 31))


# ---- killed at random

STEPS = thorough(200, 60)
KILLS = thorough(10, 3)


def supervised(
    folder: Path,
    kills: int,
    seed: int,
    *options: Any,
    ranks: int = 1,
    steps: int = STEPS,
    save_s: float = 0.0,
) -> int:
    """Restart a run until it ends; SIGKILL it, workers and all, at random moments.

    Where a save takes at least `save_s`, every other kill comes inside of one.

    Returns:
        How many of them came while a checkpoint was being written.
    """
    rng, saving = random.Random(seed), 0
    given = runs.fitting(folder, "--trainer.max_steps", steps, *options, "--ckpt_path", "last")
    for number in range(kills):
        begun = entries(folder)
        patience = rng.uniform(4, 20)  # steps, any part of one included
        leash = {"class_path": "training.runs.Leash", "init_args": {"steps": int(patience) + 2}}
        leashed = [*given, "--trainer.callbacks+", json.dumps(leash)]
        running = runs.Running(leashed, folder, ranks)
        while entries(folder) < begun + int(patience) and running.alive():
            time.sleep(0.001)
        if save_s and number % 2 == 0:
            end = time.monotonic() + 2
            while not half_saved(folder) and time.monotonic() < end:
                time.sleep(0.001)
            time.sleep(patience % 1 * save_s)
        else:
            time.sleep(patience % 1 * 0.05)
        assert running.alive(), running.wait()
        running.kill()
        saving += half_saved(folder)
    assert runs.Running(given, folder, ranks).wait().succeeded().err == ""
    return saving


def half_saved(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step-*.tmp-*"))


def entries(folder: Path) -> int:
    witness = folder / "witness-0.jsonl"
    return len(witness.read_text().splitlines()) if witness.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "every"),
    [
        pytest.param(0, 5, id="no loader worker"),
        pytest.param(2, 5, id="2 loader workers"),
        pytest.param(0, 1, id="a save in every step"),
    ],
)
def test_random_kills_leave_no_trace(workers: int, every: int, tmp_path: Path):
    options = ["--data.init_args.num_workers", workers, "--checkpoints.every_n_steps", every]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.fit(whole, "--trainer.max_steps", STEPS, *options).succeeded()
    supervised(killed, KILLS, 100 * workers + every, *options)
    lost, repeated = traces(killed, whole, KILLS)
    figure(f"{KILLS} kills: {lost} samples lost, {repeated} repeated")
    assert (lost, repeated) == (0, 0)


def traces(killed: Path, whole: Path, kills: int, steps: int = STEPS) -> tuple[int, int]:
    """Compare a run that was killed with one that was not, all equal in every digit.

    Returns:
        How many samples were lost and how many repeated.
    """
    restarts = (killed / "witness-0.jsonl").read_text().count("resumed")
    assert restarts == kills + 1
    found, expected = runs.witnessed(killed), runs.witnessed(whole)
    assert found == expected
    ours, uninterrupted = (
        load_pretrained(newest_whole(f / "checkpoints")) for f in (killed, whole)
    )
    for name, weight in uninterrupted.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    rows = [{row[0] for row in step} for step in runs.samples(found)]
    seen = set().union(*rows)
    lost = set(range(runs.BATCH * steps)) - seen
    return len(lost), sum(map(len, rows)) - len(seen)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["start", "last"])
def test_every_file_of_a_checkpoint_is_hashed_once_by_one_process(how: str, tmp_path: Path):
    ranks = 2
    source = runs.alone().folder
    options: list[Any] = ["--trainer.callbacks+", "training.hashed.Hashed"]
    if how == "last":
        shutil.copytree(source, tmp_path, dirs_exist_ok=True)
        options += ["--ckpt_path", "last", "--trainer.max_steps", 31]
        step = tmp_path / "checkpoints" / "step-00000030"
    else:
        options += ["--model.init_args.checkpoint", source, "--model.init_args.config", "null"]
        options += ["--trainer.max_steps", 5]
        step = source / "checkpoints" / "step-00000030"
    runs.fit(tmp_path, *options, ranks=ranks).succeeded()
    sizes = {str(step / name): file["bytes"] for name, file in manifest.read(step)["files"].items()}
    small = str(step / "model.json")
    found = [
        [tuple(each) for each in json.loads((tmp_path / f"hashed-{rank}.json").read_text())]
        for rank in range(ranks)
    ]
    large = [[each for each in files if each[0] in sizes and each[0] != small] for files in found]
    assert sorted(chain.from_iterable(large)) == sorted(
        (f, n) for f, n in sizes.items() if f != small
    )
    for rank, files in enumerate(found):
        hashed = sum(size for path, size in files if path in sizes)
        print(
            f"{how}, process {rank} of {ranks}: {hashed:,} of {sum(sizes.values()):,} bytes hashed"
        )


# ---- one run per folder, and its own data

WARM = ["--model.init_args.schedule.init_args.warmup_steps", 1]
"""For runs of a few steps."""


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(tmp_path: Path):
    endless = ["--trainer.max_steps", 100_000, "--checkpoints.every_n_steps", 100_000]
    first = runs.Running(runs.fitting(tmp_path, *endless), tmp_path)
    try:
        lock, end = tmp_path / ".lock", time.monotonic() + runs.TIMEOUT
        while not (lock.is_file() and "process" in lock.read_text()):
            assert first.alive()
            assert time.monotonic() < end
            time.sleep(0.1)
        for options in ([], ["--ckpt_path", "last"]):
            second = runs.fit(tmp_path, *options)
            assert second.code == 1
            assert f"{tmp_path} is in use by process {first.processes[0].pid} on" in second.err
            assert len(second.err.splitlines()) == 1
        assert first.alive()
    finally:
        first.kill()
    assert runs.fit(tmp_path, "--trainer.max_steps", 2, *WARM).code == 0


CHANGES = [
    pytest.param(["--data.init_args.seed", 7], "seed was 0, is 7", id="seed"),
    pytest.param(["--data.init_args.packing", "best_fit"], "packing was concatenate", id="packing"),
    pytest.param(["--data.init_args.sources.code.weight", 0.5], "weights was", id="weights"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "said"), CHANGES)
def test_a_resume_with_other_data_is_refused_and_goes_on_knowingly(
    options: list[Any], said: str, tmp_path: Path
):
    start = runs.alone().folder / "checkpoints" / "step-00000020"
    refused = runs.fit(tmp_path / "a", "--ckpt_path", start, *options)
    assert refused.code == 1
    assert "the run's data has changed: " in refused.err
    assert said in refused.err
    allowed = [*options, "--data.init_args.allow_changed_data", "true"]
    assert runs.fit(tmp_path / "b", "--ckpt_path", start, *allowed).code == 0


@pytest.mark.slow
def test_many_micro_batches_fit_into_the_usual_limit_of_open_files(tmp_path: Path):
    """128 micro-batches a step and 2 loader workers, begun under a soft limit of 1,024 files."""
    rows = ["--data.init_args.batch_tokens", 128 * runs.WINDOW]
    small = [*rows, "--data.init_args.micro_batch_size", 1, "--data.init_args.num_workers", 2]
    arguments = runs.fitting(tmp_path, *small, "--trainer.max_steps", 2, *WARM)
    command = [sys.executable, "-m", "lit_longctx.cli", *map(str, arguments)]
    limited = ["bash", "-c", 'ulimit -Sn 1024; exec "$@"', "bash", *command]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    ran = subprocess.run(limited, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.slow
def test_the_clock_saves_too(tmp_path: Path):
    """Every step is later than 1e-6 minutes after the last."""
    clock = ["--checkpoints.every_n_steps", 1000, "--checkpoints.every_minutes", 1e-6]
    ran = runs.fit(
        tmp_path, *clock, "--trainer.max_steps", 3, *WARM, "--checkpoints.keep", 5
    ).succeeded()
    names = sorted(p.name for p in (ran.folder / "checkpoints").glob("step-*"))
    assert names == [f"step-{n:08d}" for n in (1, 2, 3)]
