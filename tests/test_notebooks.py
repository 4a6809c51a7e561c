"""Every notebook runs as it is kept: its asserts are tests, its outputs are not in git.

Notebooks read what `make quickstart` leaves behind. Here the same commands, on the shipped configs,
make a smaller copy of it. What the study leaves behind is written by hand.
"""

import json
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from training import runs

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))
WINDOW = 2048
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the notebooks beside small data and runs, made as the quickstart makes them."""
    root = tmp_path_factory.mktemp("quickstart")
    data, short, long = (
        root / "data/stdlib",
        root / "runs/quickstart_short",
        root / "runs/quickstart",
    )
    run("prepare", "quickstart_prepare", output=data)
    shape = {f"model.init_args.config.{key}": number for key, number in SHAPE.items()}
    run("fit", "quickstart_short", **shape, **two_steps(short, data, 256))
    start = {"model.init_args.checkpoint": short}
    run("fit", "quickstart", **start, **two_steps(long, data, WINDOW))
    asked = {"checkpoint": f"[{short},{long}]", "data": f"[{data}]", "window": WINDOW, "windows": 8}
    run("evaluate", "quickstart_evaluate", **asked, output=long / "evaluation")
    shutil.copytree(FOLDER.parent / "benchmarks", root / "benchmarks")
    write_study(root / "runs/study")
    return Path(shutil.copytree(FOLDER, root / "notebooks"))


def write_study(folder: Path) -> None:
    """Write results of a study that was stopped before its last part."""
    edges = [0, 512, 1024, 2048]
    real = "checkpoints/smollm2"
    schemes = {real: [3.0, 2.9, 4.0], f"{real} YaRN(factor=2.0)": [3.1, 3.0, 2.8]}
    untrained = {"edges": edges, "loss": schemes, "trained_context": 1024}
    nats = {"ABF_0": 2.0, "ABF_1": 2.1, "RoPE_0": 2.25, "RoPE_1": 2.25}
    runs_of_b = {f"runs/study/b/{run}": [9.0, n, n + 0.2] for run, n in nats.items()}
    trained = {"edges": edges, "targets": [10.0, 30.0, 10.0]}
    trained["loss"] = {"runs/quickstart_short": [9.0, 5.0, 5.0], **runs_of_b}
    for part, found in (("a", untrained), ("b_evaluation", trained)):
        (folder / part).mkdir(parents=True)
        (folder / part / "results.json").write_text(json.dumps(found))


def run(verb: str, config: str, **options: object) -> None:
    """Run a command of the quickstart with other options."""
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    runs.run(verb, "--config", FOLDER.parent / f"config/{config}.yaml", *given).succeeded()


def two_steps(folder: Path, data: Path, window: int) -> dict[str, object]:
    """Return the options of a short training run."""
    rows = {"window": window, "batch_tokens": 2 * window, "micro_batch_size": 1}
    read = rows | {"held_out_windows": 2, "sources.stdlib.folder": data}
    trainer = {"default_root_dir": folder, "max_steps": 2, "val_check_interval": 2}
    named = {f"data.init_args.{name}": value for name, value in read.items()}
    named["model.init_args.schedule.init_args.warmup_steps"] = 0
    return named | {f"trainer.{name}": value for name, value in trainer.items()}


def executed(notebooks: Path, name: str) -> list[nbformat.NotebookNode]:
    """Return the outputs of a notebook, run in its folder."""
    notebook = nbformat.read(notebooks / name, as_version=4)
    place = {"metadata": {"path": str(notebooks)}}
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources=place).execute()
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.slow  # what notebooks call is under test elsewhere; here, that they still run
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs_and_draws_its_figures(name: str, notebooks: Path):
    outputs = executed(notebooks, name)
    shown = [output.data for output in outputs if "data" in output]
    figures = [data for data in shown if data.get("text/plain", "").startswith("<Figure")]
    assert all("image/png" in data for data in figures)
    if name == "7_study.ipynb":
        assert len(figures) == 2
        said = "".join(output.text for output in outputs if "text" in output)
        # by hand: (2.0·30 + 2.2·10)/40 of ABF's seed 0; differences 0.25 and 0.15, t = 12.706
        assert "ABF             2.0500, 2.1500 nats\n" in said
        assert "ABF better than RoPE (Xiong et al. 2023, table 5): +0.2000 ± 0.6353 nats" in said
        assert "PI better" not in said
        assert [line.split(":")[0] for line in said.splitlines() if "not reached" in line] == [
            "a_needles",
            "c_evaluation",
        ]


@pytest.mark.parametrize("name", NOTEBOOKS[1:])
def test_without_the_quickstart_it_says_in_one_line_what_to_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first, *_ = (c for c in nbformat.read(FOLDER / name, 4).cells if c.cell_type == "code")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^.* is missing: run `make quickstart`.*$"):
        exec(first.source, {})


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_git_holds_no_outputs(name: str):
    shown = subprocess.run(
        ["git", "show", f":./{name}"], cwd=FOLDER, capture_output=True, text=True
    )
    text = (FOLDER / name).read_text() if shown.returncode else shown.stdout
    cells = [cell for cell in nbformat.reads(text, 4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
