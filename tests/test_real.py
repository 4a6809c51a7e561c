"""`make real` in small: its own commands, over a Llama of two layers and documents of words."""

import json
import random
import re
import runpy
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gguf")

import gguf_files
from PIL import Image
from training.runs import own_process_group

from lit_longctx.cli import main

ROOT = Path(__file__).parent.parent
SMALLER = {
    "prepare": "--input [texts.jsonl]",
    "evaluate": "--window 512 --loss.edges [128,256,512] --grid.lengths [384,512] --device cpu",
    "fit": "--data.init_args.window 256 --data.init_args.batch_tokens 256",
}
"""Options that make a verb's work small."""
SCHEMES = ["as it is", "PositionInterpolation", "NTKAware", "YaRN", "RoPE"]


def commands() -> list[list[str]]:
    """Return the arguments of every call of `lit_longctx` in the Makefile's `real`."""
    made = ["make", "-nB", "--old-file", "venv", "--old-file", ".venv/installed", "real"]
    printed = subprocess.run(made, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = printed.replace("\\\n", "").splitlines()
    return [
        shlex.split(line.split("lit_longctx ", 1)[1]) for line in lines if "/lit_longctx " in line
    ]


def run(command: list[str]) -> None:
    verb, *options = command
    options = [re.sub(r"^config/", f"{ROOT}/config/", option) for option in options]
    assert main([verb, *options, *SMALLER.get(verb, "").split()]) == 0


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    seeded = random.Random(0)
    words = ["".join(seeded.choices("abcdefghij", k=4)) for _ in range(50)]
    with open("texts.jsonl", "w") as file:
        for number in range(40):
            text = " ".join(seeded.choices(words, k=300))
            file.write(json.dumps({"id": str(number), "text": text}) + "\n")
    with own_process_group():  # training happens in this process
        yield tmp_path


@pytest.mark.slow
def test_all_commands_in_turn(folder, capsys):
    verbs = [command[0] for command in commands()]
    assert verbs == [*("import", "prepare", "evaluate", "evaluate", "fit", "export", "evaluate")]
    for command in commands():
        if command[0] == "import":
            file = Path(command[command.index("--gguf") + 1])
            file.parent.mkdir(parents=True)
            gguf_files.write(file, gguf_files.llama(max_position_embeddings=256))
        run(command)
    evaluated = (folder / "runs/real_evaluation/measurements.jsonl").read_text()
    run(commands()[2])  # stopped and started again, nothing is measured twice
    assert (folder / "runs/real_evaluation/measurements.jsonl").read_text() == evaluated
    runpy.run_path(str(ROOT / "benchmarks/real.py"), run_name="__main__")
    rows = [
        line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if "|" in line
    ]
    losses = rows[rows.index("nats per token by tokens before") + 2 :]
    assert [name.split("(")[0] for name in losses[:5]] == SCHEMES
    assert losses[5].startswith("YaRN")
    assert losses[5].endswith("trained")
    config = json.loads((folder / "exports/real/config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "yarn"
    assert config["max_position_embeddings"] == 512  # twice the toy's
    assert Image.open(folder / "runs/real_evaluation/real.png").width > 500
