"""The command line: what it refuses in one line, what it prints, what a run leaves behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from training import runs

from lit_longctx import manifest
from lit_longctx.checkpoint import export_pretrained
from lit_longctx.cli import VERBS
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE


def error(ran: runs.Ran) -> str:
    """Return the one line of a refusal."""
    assert ran.code == 1
    (line,) = ran.err.splitlines()
    prefix = "lit_longctx: error: "
    assert line.startswith(prefix)
    assert len(line) < 500
    return line.removeprefix(prefix)


def started(*arguments: str) -> subprocess.CompletedProcess:
    """Run the installed command in a process of its own."""
    command = Path(sys.executable).with_name("lit_longctx")
    return subprocess.run([command, *arguments], capture_output=True, text=True)


# ---- help


def test_help_lists_the_verbs():
    ran = started("--help")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert all(re.search(rf"^  {verb} ", ran.stdout, re.MULTILINE) for verb in VERBS)


def test_help_is_quick_as_it_imports_nothing_of_others():
    """Seconds would hang on the machine; what costs them is torch, Lightning and the like."""
    code = "from lit_longctx.cli import main; main(['--help'])"
    added = packages(code) - packages("pass")
    assert "lit_longctx" in added
    assert added - {"lit_longctx"} <= sys.stdlib_module_names


def packages(code: str) -> set[str]:
    """Return the packages that a process has imported after running the code."""
    command = [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in ran.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize("verb", ["fit", "prepare", "evaluate", "export", "generate"])
def test_a_verbs_help_explains_its_options(verb: str):
    ran = runs.run(verb, "--help").succeeded()
    assert ran.err == ""
    assert "--config" in ran.out
    assert verb == "fit" or "(required" in ran.out


# ---- refusals


@pytest.mark.slow
def test_the_installed_command_refuses_in_one_line():
    ran = started("fit", "--config", str(runs.config()), "--trainer.foo", "3")
    assert ran.returncode == 1
    assert ran.stderr == "lit_longctx: error: unrecognized arguments: --trainer.foo 3\n"


def test_debug_shows_the_traceback():
    ran = runs.run("fly", "--debug")
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert ran.err.splitlines()[-1].startswith("ValueError: verb 'fly' unknown")


def test_a_key_of_earlier_configs_is_refused_with_its_new_name():
    old = ["--model.init_args.activation_checkpointing", "true"]
    ran = runs.run("fit", "--config", str(runs.config()), *old)
    assert ran.code == 2
    assert ran.err.endswith("activation_checkpointing is now called recompute, block for true\n")


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize(
    ("arguments", "culprits"),
    [
        (["fly"], ["verb 'fly' unknown", "fit, validate, test, prepare"]),
        (["synthesize"], ["required", "task"]),
        (["plan"], ["plan needs --config"]),
        (["plan", "--config", "x"], ["config: File does not exist", "x"]),
        (["plan", "--config", "x", "--gpus", "many"], ["--gpus", "invalid int value", "many"]),
        (["fit"], ["required", "model"]),
        (["fit", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["prepare", "--foo", "3"], ["--foo"]),
        (["prepare", "--output", "x"], ["required", "input"]),
        (["prepare", "--input", "[nowhere.jsonl]", "--output", "x"], ["nowhere.jsonl"]),
        (["export", "--checkpoint", "nowhere", "--output", "x"], ["nowhere does not exist"]),
        (["generate", "--checkpoint", "nowhere", "--prompt", "x"], ["nowhere does not exist"]),
        (
            ["evaluate", "--checkpoint", "[x]", "--data", "[nowhere]", "--output", "x"],
            ["nowhere does not exist"],
        ),
    ],
)
def test_a_verb_refuses_in_one_line(arguments: list[str], culprits: list[str], tmp_path: Path):
    message = error(runs.run(*arguments, folder=tmp_path))
    assert all(culprit in message for culprit in culprits), message


WARMUP = ["--model.init_args.schedule.init_args.warmup_steps"]
WINDOW, BATCH_TOKENS = ["--data.init_args.window"], ["--data.init_args.batch_tokens"]


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize(
    ("options", "culprits"),
    [
        (["--trainer.foo", 3], ["--trainer.foo"]),
        (["--model.init_args.foo", 3], ["ContinualPretrain", "'foo' is not accepted"]),
        (
            ["--model.init_args.position", "Foo"],
            [
                "position",
                "no class named Foo; expected one of DynamicNTK, Llama3, LongRoPE, NTKAware, NoPE, "
                "PartialRoPE, PositionInterpolation, ProportionalRoPE, RoPE, TransformerXL, XPos, "
                "YaRN",
            ],
        ),
        (
            ["--model.init_args.schedule", "Foo"],
            ["schedule", "no class named Foo; expected one of", "WarmupCosine"],
        ),
        (
            ["--model.init_args.position", "RoPE", "--model.init_args.position.init_args.base", 3],
            ["RoPE", "'base' is not accepted"],
        ),
        (["--model.init_args.learning_rate", "fast"], ["learning_rate", "fast"]),
        (["--model.init_args.config.num_hidden_layers", "null"], ["num_hidden_layers"]),
        (["--model.init_args.config.num_key_value_heads", 3], ["num_key_value_heads 3"]),
        (["--model.init_args.config.vocab_size", 200], ["258", "200"]),
        (["--model.init_args.checkpoint", "nowhere"], ["either a checkpoint"]),
        (["--data.init_args.sources", "{a: {folder: nowhere}}"], ["data folder nowhere"]),
        ([*WINDOW, 8192, *BATCH_TOKENS, 8192], ["window 8192 exceeds chunk of 4096", "prepare"]),
        ([*WINDOW, 100, *BATCH_TOKENS, 800], ["window 100", "256"]),
        ([*BATCH_TOKENS, 1000], ["batch_tokens 1000", "window 256"]),
        (["--trainer.max_steps", -1], ["max_steps"]),
        (["--ckpt_path", "nowhere"], ["checkpoint nowhere does not exist"]),
        (["--checkpoints.keep", 0], ["keep 0"]),
        (["--checkpoints.every_n_steps", 0], ["checkpoints.every_n_steps 0 must be 1 or more"]),
        (["--progress.every_n_steps", 0], ["progress.every_n_steps 0 must be 1 or more"]),
        ([*WARMUP, -5], ["warmup_steps -5", "0 or more"]),
        ([*WARMUP, 31], ["warmup_steps 31", "30 steps"]),
        (["--optimizer", "SGD"], ["--optimizer"]),
        (["--model.init_args.learning_rate", 1e30], ["step 1", "samples 8 to 15", "as before"]),
    ],
)
def test_fit_refuses_in_one_line(options: list[Any], culprits: list[str], tmp_path: Path):
    message = error(runs.fit(tmp_path / "run", *options))
    assert all(culprit in message for culprit in culprits), message
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    ("place", "culprit"),
    [
        (("model", "init_args"), "Option 'foo' is not accepted"),
        (("model", "init_args", "config"), "Option 'foo' is not accepted"),
        (("data", "init_args"), "Option 'foo' is not accepted"),
        (("trainer",), "trainer.foo"),
        ((), "foo"),
    ],
)
def test_an_unknown_key_in_the_yaml_is_refused_by_name(
    place: tuple[str, ...], culprit: str, tmp_path: Path
):
    content = yaml.safe_load(runs.config().read_text())
    part = content
    for key in place:
        part = part[key]
    part["foo"] = 3
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump(content))
    assert culprit in error(runs.run("fit", "--config", bad, folder=tmp_path))


def test_yaml_that_does_not_parse_is_refused_with_its_line(tmp_path: Path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("model:\n  class_path: ContinualPretrain\n init_args: {}\n")
    assert "line 3" in error(runs.run("fit", "--config", bad, folder=tmp_path))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_altered_chunk_is_refused_by_file(workers: int, tmp_path: Path):
    folder = Path(shutil.copytree(runs.sources()["code"]["folder"], tmp_path / "code"))
    chunk = folder / "train" / "chunk-0-0.bin"
    content = bytearray(chunk.read_bytes())
    content[-1] ^= 1
    chunk.write_bytes(content)
    source = {"code": {"folder": str(folder), "weight": 1.0}}
    options = ["--data.init_args.sources", json.dumps(source)]
    ran = runs.fit(tmp_path / "run", *options, "--data.init_args.num_workers", workers)
    assert error(ran).startswith(f"{chunk} is altered")


# ---- starting from a checkpoint

SHAPE = LlamaConfig(
    vocab_size=258,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=512,
    bos_token_id=256,
    eos_token_id=257,
)


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    """A Hugging Face folder of random weights with theta 5e5."""
    llama = Llama(SHAPE, RoPE(theta=5e5))
    return export_pretrained(llama, tmp_path / "hugging_face")


ONE_STEP = ["--trainer.max_steps", 1, "--model.init_args.schedule.init_args.warmup_steps", 0]


def start_from(checkpoint: Path, folder: Path, *options: Any, ranks: int = 1) -> runs.Ran:
    """Train one step from a checkpoint."""
    start = ["--model.init_args.config", "null", "--model.init_args.checkpoint", checkpoint]
    return runs.fit(folder, *start, *ONE_STEP, *options, ranks=ranks)


def theta_in(folder: Path) -> float:
    """Theta with which a run was trained, by its checkpoint."""
    description = json.loads((folder / "checkpoints" / "step-00000001" / "model.json").read_text())
    return description["position"]["init_args"]["theta"]


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    ("options", "theta", "from_checkpoint"),
    [
        pytest.param([], 5e5, False, id="no position"),
        pytest.param(["--model.init_args.position", "RoPE"], 5e5, True, id="RoPE"),
        pytest.param(
            ["--model.init_args.position", "{class_path: RoPE}"], 5e5, True, id="class_path only"
        ),
        pytest.param(
            ["--model.init_args.position", "{class_path: RoPE, init_args: {theta: 2e6}}"],
            2e6,
            False,
            id="theta given",
        ),
        pytest.param(
            ["--model.init_args.position", "RoPE", "--model.init_args.position.theta", "1e4"],
            1e4,
            False,
            id="theta given as the default",
        ),
    ],
)
def test_theta_left_open_is_the_checkpoints(
    options: list[str], theta: float, from_checkpoint: bool, hugging_face: Path, tmp_path: Path
):
    ran = start_from(hugging_face, tmp_path / "run", *options).succeeded()
    assert theta_in(tmp_path / "run") == theta
    assert re.search(rf"^position: (.* → )?RoPE\(theta={theta:.1f}\)$", ran.out, re.MULTILINE)
    assert (f"position: theta 500000 from {hugging_face}" in ran.out) == from_checkpoint


@pytest.mark.slow
def test_two_processes_say_once_what_they_took_from_the_checkpoint(
    hugging_face: Path, tmp_path: Path
):
    given = ["--model.init_args.position", "RoPE"]
    ran = start_from(hugging_face, tmp_path / "run", *given, ranks=2).succeeded()
    assert ran.out.count("position: theta 500000") == ran.out.count("model: ") == 1
    assert theta_in(tmp_path / "run") == 5e5


@pytest.mark.slow
@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("given", [None, 1e4])
def test_theta_of_a_config_file_left_open_is_the_checkpoints(
    given: float | None, hugging_face: Path, tmp_path: Path
):
    content = yaml.safe_load(runs.config().read_text())
    arguments = {} if given is None else {"theta": given}
    content["model"]["init_args"]["position"] = {"class_path": "RoPE", "init_args": arguments}
    content["model"]["init_args"]["checkpoint"] = str(hugging_face)
    del content["model"]["init_args"]["config"]
    content["trainer"]["max_steps"] = 1
    content["model"]["init_args"]["schedule"]["init_args"]["warmup_steps"] = 0
    content["trainer"]["default_root_dir"] = str(tmp_path / "run")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    runs.run("fit", "--config", tmp_path / "run.yaml", folder=tmp_path).succeeded()
    assert theta_in(tmp_path / "run") == (given or 5e5)


@pytest.mark.slow
def test_a_run_folder_is_a_start_too(tmp_path: Path):
    ran = start_from(runs.alone().folder, tmp_path / "run").succeeded()
    newest = runs.alone().folder / "checkpoints" / "step-00000030"
    assert f"35,104 parameters from {newest}" in ran.out
    assert sorted(runs.witnessed(tmp_path / "run")) == [1]


def test_a_start_that_is_not_there_is_refused(tmp_path: Path):
    message = error(start_from(tmp_path / "nowhere", tmp_path / "run"))
    assert message.startswith(f"checkpoint {tmp_path / 'nowhere'} does not exist")


@pytest.mark.parametrize("damage", ["truncated", "NaN"])
def test_a_bad_start_is_refused(damage: str, hugging_face: Path, tmp_path: Path):
    weights = hugging_face / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        expected = f"{weights} is torn"
    else:
        found = load_file(weights)
        found["model.norm.weight"].fill_(float("nan"))
        save_file(found, weights)
        (hugging_face / manifest.NAME).unlink()
        expected = f"{hugging_face}: model.norm.weight (1 weights) holds NaN"
    assert error(start_from(hugging_face, tmp_path / "run")).startswith(expected)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
    ("options", "culprits"),
    [
        (["config.num_hidden_layers", 1], ["num_hidden_layers 1", "2"]),
        (["config.intermediate_size", 48], ["intermediate_size 48", "64"]),
        (["position", "{class_path: RoPE, init_args: {theta: 2e4}}"], ["theta=20000", "10000"]),
        (["position", "TransformerXL"], ["TransformerXL", "RoPE"]),
    ],
)
def test_resuming_another_model_is_refused(options: list[Any], culprits: list[str], tmp_path: Path):
    folder = Path(shutil.copytree(runs.alone().folder, tmp_path / "run"))
    key, value = options
    changed = [f"--model.init_args.{key}", value, "--trainer.max_steps", 40]
    message = error(runs.fit(folder, "--ckpt_path", "last", *changed))
    assert f"{folder / 'checkpoints' / 'step-00000030'} is of another model" in message
    assert all(culprit in message for culprit in culprits), message


def test_validating_under_a_scheme_whose_weights_are_not_there_is_refused(tmp_path: Path):
    checkpoint = runs.alone().folder / "checkpoints" / "step-00000020"
    given = ["--config", runs.config(), "--trainer.default_root_dir", tmp_path]
    scheme = ["--model.init_args.position", "TransformerXL"]
    ran = runs.run("validate", *given, *scheme, "--ckpt_path", checkpoint)
    assert "layers.0.self_attn.position" in error(ran)


# ---- what a run leaves


def test_a_run_folder_holds_config_events_tokenizer_and_checkpoints():
    folder = runs.alone().folder
    names = {re.sub(r"events\..*", "events", p.name) for p in folder.iterdir()}
    expected = {"config.yaml", "events", "tokenizer", "checkpoints"}
    assert expected <= names
    assert {p.name for p in (folder / "tokenizer").iterdir()} >= {"tokenizer.json"}
    newest = folder / "checkpoints" / "step-00000030"
    assert manifest.verify(newest)["files"].keys() >= {".metadata", "meta.pt", "model.json"}


def test_the_run_folders_config_is_the_resolved_one():
    content = yaml.safe_load((runs.alone().folder / "config.yaml").read_text())
    assert content["model"]["class_path"].endswith(".ContinualPretrain")
    assert content["model"]["init_args"]["weight_decay"] == 0.1  # a default, written out
    assert content["model"]["init_args"]["learning_rate"] == 3e-3
    assert content["data"]["init_args"]["window"] == runs.WINDOW
    assert content["trainer"]["max_steps"] == 30
    saving = {"every_n_steps": 10, "keep": 9, "every_minutes": 30.0, "async_save": False}
    assert content["checkpoints"] == saving


@pytest.mark.slow
def test_a_run_repeats_from_the_config_it_left(tmp_path: Path):
    left = runs.alone().folder / "config.yaml"
    run = ["--trainer.default_root_dir", tmp_path, "--trainer.max_steps", 30]
    runs.run("fit", "--config", left, *run, folder=tmp_path).succeeded()
    assert runs.witnessed(tmp_path) == runs.witnessed(runs.alone().folder)


def test_metrics_have_the_contracts_names():
    tags = runs.scalars(runs.alone().folder)
    every_step = {f"train/{name}" for name in ("loss", "grad_norm", "lr", "tokens")}
    buckets = {
        f"val/loss_{kind}/{edges}" for kind in ("pos", "len") for edges in ("0-128", "128-256")
    }
    held_out = {"val/loss", "val/ppl", "val/loss_len/256", *buckets}
    by_source = {"val/loss_source/prose", "val/loss_source/code"}
    speed = {"perf/tokens_per_s_per_gpu", "perf/data_wait_pct"}
    assert set(tags) == every_step | held_out | by_source | speed
    seen = runs.witnessed(runs.alone().folder)
    for name in every_step:
        values = [getattr(seen[step], name.removeprefix("train/")) for step in sorted(seen)]
        assert tags[name] == list(enumerate(values, 1))
    assert tags["train/tokens"][-1] == (30, 30 * runs.BATCH * runs.WINDOW)
    perplexity, loss = tags["val/ppl"][-1][1], tags["val/loss"][-1][1]
    assert perplexity == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-6)


def test_loggers_hold_the_runs_settings():
    folder = runs.alone().folder
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert yaml.safe_load((folder / "hparams.yaml").read_text()) == settings
    events = EventAccumulator(str(folder)).Reload()
    content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    shown = HParamsPluginData.FromString(content).session_start_info.hparams
    assert shown["model.init_args.learning_rate"].number_value == 3e-3
    assert shown["data.init_args.sources.prose.weight"].number_value == 0.75
    assert shown["model.class_path"].string_value.endswith(".ContinualPretrain")


@pytest.mark.slow
def test_what_a_run_never_reaches_is_said_at_its_start(tmp_path: Path):
    rare = ["--trainer.val_check_interval", 7, "--checkpoints.every_n_steps", 500]
    ran = runs.fit(tmp_path, "--trainer.max_steps", 6, *rare).succeeded()
    before, _, _ = ran.out.partition("step 1/6")
    assert before.splitlines()[2:] == [
        "validation: never, as val_check_interval is 7 steps and the run ends at step 6",
        "checkpoints: none before the end at step 6, as every_n_steps is 500",
    ]


@pytest.mark.slow
@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(("verb", "prefix"), [("validate", "val"), ("test", "test")])
def test_a_checkpoint_measured_alone_gives_what_fit_logged(verb: str, prefix: str, tmp_path: Path):
    checkpoint = runs.alone().folder / "checkpoints" / "step-00000020"
    given = ["--config", runs.config(), "--trainer.default_root_dir", tmp_path]
    ran = runs.run(verb, *given, "--ckpt_path", checkpoint).succeeded()
    assert ran.err == ""
    logged = runs.scalars(runs.alone().folder)
    found = runs.scalars(tmp_path)
    held_out = {name for name in logged if name.startswith("val/")}
    assert set(found) == {f"{prefix}/{name.removeprefix('val/')}" for name in held_out}
    for name in held_out:
        ((step, value),) = found[f"{prefix}/{name.removeprefix('val/')}"]
        assert (step, value) == (20, dict(logged[name])[20])
    assert f"step 20  held-out loss {dict(logged['val/loss'])[20]:.4f}" in ran.out


def test_there_is_nothing_to_validate_in_an_empty_run_folder(tmp_path: Path):
    given = ["--config", runs.config(), "--trainer.default_root_dir", tmp_path]
    message = error(runs.run("validate", *given, "--ckpt_path", "last"))
    assert message.startswith("checkpoint last does not exist")


@pytest.mark.slow
def test_later_config_files_and_options_win(hugging_face: Path, tmp_path: Path):
    start = {"checkpoint": str(hugging_face), "config": None, "learning_rate": 1e-4}
    (tmp_path / "second.yaml").write_text(
        yaml.safe_dump({"model": {"init_args": {**start, "weight_decay": 0.2}}})
    )
    second = ["--config", tmp_path / "second.yaml", "--model.init_args.learning_rate", 2e-4]
    runs.fit(tmp_path / "run", *second, *ONE_STEP).succeeded()
    content = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    found = content["model"]["init_args"]
    assert (found["learning_rate"], found["weight_decay"]) == (2e-4, 0.2)
    assert found["schedule"]["init_args"] == {"warmup_steps": 0, "final": 0.1}
    assert theta_in(tmp_path / "run") == 5e5


def test_printed_config_fed_back_prints_itself(tmp_path: Path):
    first = runs.run("fit", "--config", runs.config(), "--print_config").succeeded()
    (tmp_path / "printed.yaml").write_text(first.out)
    second = runs.run("fit", "--config", tmp_path / "printed.yaml", "--print_config").succeeded()
    assert second.out == first.out
    assert yaml.safe_load(first.out)["model"]["init_args"]["learning_rate"] == 3e-3
    assert first.err == second.err == ""


def test_a_run_prints_nothing_but_its_progress():
    ran = runs.alone()
    assert ran.err == ""
    lines = ran.out.splitlines()
    assert lines[:2] == [
        "model: 35,104 parameters from random weights",
        "position: RoPE(theta=10000.0)",
    ]
    steps = [line for line in lines if re.match(r"step \d+/30  loss \d\.\d{4}  grad ", line)]
    assert [line.split("/")[0] for line in steps] == ["step 1", "step 10", "step 20", "step 30"]
    assert all(re.search(r"  ETA \d:\d\d:\d\d$", line) for line in steps)
    assert lines[-1] == f"wrote {ran.folder} (checkpoint step-00000030)"


@pytest.mark.slow
@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_saves_and_says_that_it_can_go_on(
    number: signal.Signals, tmp_path: Path
):
    running = runs.Running(runs.fitting(tmp_path, "--trainer.max_steps", 10_000), tmp_path)
    witness = tmp_path / "witness-0.jsonl"
    while not (witness.exists() and len(witness.read_text().splitlines()) > 2):
        assert running.alive(), running.wait().err
        time.sleep(0.01)
    os.kill(running.processes[0].pid, number)
    ran = running.wait()
    assert (ran.code, ran.err) == (75, "")
    step = max(runs.witnessed(tmp_path))
    last = f"stopped by {number.name} at step {step}; go on with --ckpt_path last"
    assert ran.out.splitlines()[-1] == last
    assert json.loads((tmp_path / "preempted").read_text())["step"] == step
    assert (tmp_path / f"checkpoints/step-{step:08d}/{manifest.NAME}").is_file()


# ---- the other verbs


def test_doctor_tells_versions_and_kernels():
    ran = runs.run("doctor").succeeded()
    assert ran.err == ""
    assert f"torch {torch.__version__.split('+')[0]}" in ran.out
    assert "attn_implementation sdpa: ready" in ran.out


def test_export_and_generate_say_where_they_wrote_what(tmp_path: Path):
    exported = runs.run(
        *("export", "--checkpoint", runs.alone().folder, "--output", tmp_path / "hf")
    ).succeeded()
    assert exported.err == ""
    assert exported.out.splitlines()[-1] == f"wrote {tmp_path / 'hf'}"
    given = ["--prompt", "ab", "--max_new_tokens", 8]
    from_run, from_export = (
        runs.run("generate", "--checkpoint", folder, *given).succeeded()
        for folder in (runs.alone().folder, tmp_path / "hf")
    )
    assert from_run.err == ""
    assert from_run.out.startswith("ab")
    assert from_run.out == from_export.out


def test_an_averaged_export_is_the_mean_of_the_runs_last_checkpoints(tmp_path: Path):
    run, weights = runs.alone().folder, {}
    for step in (10, 20, 30):
        weights[step] = runs.stored(run / f"checkpoints/step-{step:08d}")["state_dict"]
    for name, last, number, steps in (
        ("run", run, 3, (10, 20, 30)),
        ("step", run / "checkpoints/step-00000020", 2, (10, 20)),
    ):
        options = ("--checkpoint", last, "--output", tmp_path / name, "--average", number)
        ran = runs.run("export", *options).succeeded()
        assert "weights: mean of step-" in ran.out
        for key, found in load_file(tmp_path / name / "model.safetensors").items():
            mean = sum(weights[step][f"llama.{key}"].double() for step in steps) / number
            torch.testing.assert_close(found.double(), mean, rtol=1e-6, atol=1e-8)
    for wrong, message in ((4, "has 2 checkpoints before it, expected 3"), (0, "must be 1 or")):
        options = ("--checkpoint", run, "--output", tmp_path / "more", "--average", wrong)
        ran = runs.run("export", *options)
        assert ran.code == 1
        (line,) = ran.err.splitlines()
        assert message in line
        assert not (tmp_path / "more").exists()


@pytest.mark.slow
def test_evaluate_reads_its_options_from_a_file(tmp_path: Path):
    options = {
        "checkpoint": [str(runs.alone().folder)],
        "data": [runs.sources()["prose"]["folder"]],
        "output": str(tmp_path / "evaluation"),
        "window": 512,
        "windows": 3,
        "positions": ["NoPE", {"class_path": "RoPE", "init_args": {"theta": 5e5}}],
    }
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump(options))
    ran = runs.run("evaluate", "--config", tmp_path / "evaluate.yaml").succeeded()
    assert ran.err == ""
    assert f"wrote {tmp_path}/evaluation/results.json" in ran.out
    assert os.path.getsize(tmp_path / "evaluation" / "loss_by_position.png") > 1000
    own = runs.alone().folder
    others = (f"{own} {scheme} | Δ [95 %]" for scheme in ("NoPE()", "RoPE(theta=500000.0)"))
    assert f"| tokens before | targets | {own} | {' | '.join(others)} |" in ran.out
