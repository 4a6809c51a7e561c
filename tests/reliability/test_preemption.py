"""A signal stops a run within 10 seconds or two steps, and nothing is lost (7)."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import figure
from training import runs

from lit_longctx.checkpoint import load_pretrained

pytestmark = pytest.mark.slow
TIMES = int(os.environ.get("SIGNALS", "2"))
"""How often each place is tried; 10 for the figures in docs/reliability.md."""
NAMES = ["SIGTERM", "SIGUSR1", "SIGINT", "SIGUSR2"]
OFTEN = ["--trainer.val_check_interval", 2, "--checkpoints.every_n_steps", 2]


@runs.shared
def one_uninterrupted() -> runs.Ran:
    """30 steps, validated and saved at every other one."""
    return runs.fit(runs.workshop() / "one_uninterrupted", *OFTEN).succeeded()


@runs.shared
def two_uninterrupted() -> runs.Ran:
    """Train the same on two processes."""
    return runs.fit(runs.workshop() / "two_uninterrupted", *OFTEN, ranks=2).succeeded()


def signal_in(place: str, step: int, rank: int = 0, name: str = "SIGTERM") -> list[str]:
    """Return the options by which a run is signalled."""
    given = {"place": place, "step": step, "rank": rank, "name": name, "every_s": 0.05}
    callback = {"class_path": "reliability.faults.SendSignal", "init_args": given}
    return ["--trainer.callbacks+", json.dumps(callback)]


def interrupted(folder: Path, step: int, name: str) -> int:
    """Check what a signal at or after a step has left; return the step that was saved."""
    left = json.loads((folder / "preempted").read_text())
    assert left["signal"] == name
    assert (folder / f"checkpoints/step-{left['step']:08d}/manifest.json").is_file()
    assert sorted(runs.witnessed(folder))[-1] == left["step"]
    assert step <= left["step"] <= step + 3
    return left["step"]


def ends_as_if_nothing_had_been(folder: Path, ranks: int, *options: Any) -> None:
    ran = runs.fit(folder, *OFTEN, "--ckpt_path", "last", *options, ranks=ranks).succeeded()
    assert ran.err == ""
    assert not (folder / "preempted").exists()
    whole = one_uninterrupted() if ranks == 1 else two_uninterrupted()
    assert runs.witnessed(folder) == runs.witnessed(whole.folder)
    found, expected = runs.scalars(folder), runs.scalars(whole.folder)
    for key in ("train/loss", "val/loss"):
        assert found[key] == expected[key], key
    ours, weights = (load_pretrained(f).state_dict() for f in (folder, whole.folder))
    assert all(torch.equal(ours[key], weight) for key, weight in weights.items())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("place", ["backward", "save", "validation", "step"])
def test_a_signal_loses_nothing(place: str, ranks: int, tmp_path: Path):
    """Signals one process of a run again and again, each time that it goes on."""
    slowest, saved = 0.0, 0
    for number in range(TIMES):
        name, rank = NAMES[number % len(NAMES)], (ranks - 1) * (number % 2 == 0)
        step = saved + (1 if number % 2 else 2)
        given = signal_in(place, step, rank, name)
        given = runs.fitting(tmp_path, *OFTEN, *given, "--ckpt_path", "last")
        running = runs.Running(given, tmp_path, ranks)
        ran = running.wait()
        slowest = max(slowest, time.time() - float((tmp_path / "signalled").read_text()))
        assert [process.exitcode for process in running.processes] == [75] * ranks, ran.err
        assert ran.err == ""
        saved = interrupted(tmp_path, step, name)
    ends_as_if_nothing_had_been(tmp_path, ranks)
    figure(
        f"inside {place}, to one of {ranks}: {TIMES} of {TIMES}, ended in {slowest:.1f} s at most"
    )
    assert slowest < 10


def test_a_signal_in_the_last_validation_is_made_up_for(tmp_path: Path):
    given = signal_in("validation", 30)
    assert runs.fit(tmp_path, *OFTEN, *given, "--ckpt_path", "last").code == 75
    assert interrupted(tmp_path, 30, "SIGTERM") == 30
    ends_as_if_nothing_had_been(tmp_path, 1)


def test_a_validation_that_is_made_up_for_is_cut_short_too(tmp_path: Path):
    for _ in range(2):
        given = [*OFTEN, *signal_in("validation", 4), "--ckpt_path", "last"]
        assert runs.fit(tmp_path, *given).code == 75
        assert interrupted(tmp_path, 4, "SIGTERM") == 4
    ends_as_if_nothing_had_been(tmp_path, 1)


def test_a_run_without_validation_stops_too(tmp_path: Path):
    given = [*signal_in("step", 7), "--trainer.limit_val_batches", 0]
    ran = runs.fit(tmp_path, *given)
    assert (ran.code, ran.err) == (75, "")
    assert interrupted(tmp_path, 7, "SIGTERM") in (7, 8)
    assert not json.loads((tmp_path / "preempted").read_text())["unvalidated"]


def test_loader_workers_outlive_a_signal_to_all(tmp_path: Path):
    """As Slurm and Ctrl-C send it: to every process of the group, workers too."""
    given = [*OFTEN, "--data.init_args.num_workers", 2, "--ckpt_path", "last"]
    saved = 0
    for name in NAMES[:TIMES]:
        arguments = runs.fitting(tmp_path, *signal_in("step", 99), *given)
        running = runs.Running(arguments, tmp_path)
        wait_for(tmp_path, saved + 2, running.alive)
        os.killpg(running.processes[0].pid or 0, signal.Signals[name])
        ran = running.wait()
        assert (ran.code, ran.err) == (75, "")
        saved = interrupted(tmp_path, saved + 2, name)
    ends_as_if_nothing_had_been(tmp_path, 1, *given)
    figure(f"to the whole group, loader workers too: {TIMES} of {TIMES}")


def saved_at(folder: Path) -> float:
    return (folder / "preempted").stat().st_mtime


def wait_for(folder: Path, step: int, alive: Callable[[], bool]) -> None:
    """Wait until a run has made a step."""
    witness, end = folder / "witness-0.jsonl", time.monotonic() + runs.TIMEOUT
    while not (witness.exists() and f'"step": {step},' in witness.read_text()):
        assert alive()
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_signal_to_torchrun_loses_nothing(tmp_path: Path):
    slowest, saved = 0.0, 0
    for number in range(TIMES):
        name, begun = NAMES[number % len(NAMES)], []

        def signal_it(process: subprocess.Popen[bytes]) -> None:
            wait_for(tmp_path, saved + 2, lambda: process.poll() is None)  # noqa: B023
            begun.append(time.time())  # noqa: B023
            if number % 2:  # noqa: B023 -- to torchrun, which passes it on, and to its processes
                os.killpg(process.pid, signal.Signals[name])  # noqa: B023
            else:
                process.send_signal(signal.Signals[name])  # noqa: B023

        arguments = runs.fitting(tmp_path, *OFTEN, *signal_in("step", 99), "--ckpt_path", "last")
        handled = ["--signals-to-handle", ",".join(NAMES)]
        ran = runs.torchrun(2, arguments, tmp_path, handled, signal_it)
        after = saved_at(tmp_path) - begun[0]
        print(f"{name}: saved after {after:.1f} s, ended after {time.time() - begun[0]:.1f}")
        slowest = max(slowest, after)  # until torchrun has ended, two Pythons and its own must
        assert ran.code != 0
        saved = interrupted(tmp_path, saved + 2, name)
    ends_as_if_nothing_had_been(tmp_path, 2)
    figure(f"to torchrun of 2: {TIMES} of {TIMES}, saved in {slowest:.1f} s at most")
    assert slowest < 10


def test_a_signal_to_the_first_of_two_that_lightning_started_loses_nothing(tmp_path: Path):
    """Without torchrun the code is 75; Ctrl-C goes to both."""
    saved = 0
    for name, send in (("SIGTERM", os.kill), ("SIGINT", os.killpg)):

        def signal_it(process: subprocess.Popen[bytes]) -> None:
            wait_for(tmp_path, saved + 2, lambda: process.poll() is None)  # noqa: B023
            send(process.pid, signal.Signals[name])  # noqa: B023

        given = [*OFTEN, *signal_in("step", 99), "--trainer.devices", 2, "--ckpt_path", "last"]
        ran = runs.as_script([], runs.fitting(tmp_path, *given), tmp_path, signal_it)
        assert ran.code == 75, ran.out
        assert "error" not in ran.out
        saved = interrupted(tmp_path, saved + 2, name)
    ends_as_if_nothing_had_been(tmp_path, 2)
    figure("to the first of 2 that Lightning started, or to both: 2 of 2 ended with 75")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_at_once(name: str, tmp_path: Path):
    """In a step that would take a minute."""
    slow = {"class_path": "reliability.faults.SendSignal"}
    slow["init_args"] = {"place": "step", "step": 99, "every_s": 60}
    given = runs.fitting(tmp_path, "--trainer.callbacks+", json.dumps(slow))
    running = runs.Running(given, tmp_path)
    witness = tmp_path / "witness-0.jsonl"
    while not witness.exists():
        assert running.alive()
        time.sleep(0.05)
    process, number = running.processes[0], signal.Signals[name]
    time.sleep(1)
    os.kill(process.pid or 0, number)
    time.sleep(1.5)
    assert process.is_alive()
    begun = time.monotonic()
    os.kill(process.pid or 0, number)
    process.join(30)
    seconds = time.monotonic() - begun
    figure(f"second {name}: ended in {seconds:.1f} s")
    assert process.exitcode == 128 + number
    assert seconds < 5
    assert "once more ends it at once" in running.wait().out


@pytest.mark.parametrize(
    ("code", "leaves", "requeues"),
    [(75, "preempted", 1), (1, "preempted", 1), (1, None, 0), (0, None, 0)],
)
@pytest.mark.parametrize("stale", [False, True])
def test_the_sbatch_example_requeues_what_can_go_on(
    code: int, leaves: str | None, requeues: int, stale: bool, tmp_path: Path
):
    """`srun` and `scontrol` are stand-ins; a file that an earlier job left counts for nothing."""
    run = tmp_path / "run"
    run.mkdir()
    if stale:
        (run / "preempted").touch()
        os.utime(run / "preempted", (1, 1))
    touch = f"touch {run / leaves}" if leaves else ":"
    stand_ins = {
        "srun": f'echo "$@" > {tmp_path}/srun; {touch}; exit {code}',
        "scontrol": f'echo "$@" >> {tmp_path}/requeued',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = Path(__file__).parents[2] / "config/slurm/fit.sbatch"
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SLURM_JOB_ID": "17"}
    command = ["bash", str(script), "a.yaml", str(run), "--trainer.max_steps", "5"]
    assert subprocess.run(command, env=environment, check=False).returncode == code
    asked = tmp_path / "requeued"
    assert (asked.read_text() if asked.exists() else "") == "requeue 17\n" * requeues
    assert (tmp_path / "srun").read_text() == (
        f"--kill-on-bad-exit=1 lit_longctx fit --config a.yaml --trainer.default_root_dir {run} "
        "--ckpt_path last --trainer.max_steps 5\n"
    )


def test_under_slurm_lightning_neither_saves_nor_requeues(monkeypatch: pytest.MonkeyPatch):
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    from lit_longctx.training import fit

    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    made: list[Any] = []
    monkeypatch.setattr(
        fit.LightningCLI, "instantiate_trainer", lambda self, **given: made.append(given)
    )
    cli = object.__new__(fit.CLI)
    cli.subcommand = "fit"
    trainer = type("Options", (dict,), {"__getattr__": dict.get})(default_root_dir="run")
    cli.config_init = {"fit": type("Options", (), {"trainer": trainer})}
    cli.instantiate_trainer()
    (plugin,) = made[0]["plugins"]
    assert isinstance(plugin, SLURMEnvironment)
    assert plugin.auto_requeue is False
