"""`lit_longctx plan`, by its command line: what it prints, and its exit codes."""

import json
import re
from pathlib import Path

import pytest
import yaml

from lit_longctx.cli import main
from lit_longctx.training import planned_run
from lit_longctx.training.fit import fit
from lit_longctx.training.hardware import GIB, SHAPES, Hardware

CONFIG = Path(__file__).parents[2] / "config"
RECIPES = sorted(
    path.stem
    for path in CONFIG.glob("*.yaml")
    if yaml.safe_load(path.read_text()).get("trainer", {}).get("accelerator") == "gpu"
)


def planned(capsys, *options):
    """Exit code and output of `plan`, and its rows by name."""
    code = main(["plan", *map(str, options)])
    out, err = capsys.readouterr()
    rows = (re.split(r"  +", line.strip()) for line in out.splitlines())
    return code, out, err, {name: cells for name, *cells in rows}


@pytest.mark.slow
def test_a_recipe_whose_checkpoint_and_data_are_not_there(capsys):
    code, out, _, rows = planned(capsys, "--config", CONFIG / "prolong_512k.yaml")
    assert code == 0
    assert rows["window, tokens"] == ["65,536", "524,288"]
    assert rows["steps"] == ["5,000", "2,500"]
    parameters = 8_030_261_248
    assert f"{parameters:,} parameters on 8 × h100_80gb" in out
    assert float(rows["moments"][0]) == pytest.approx(parameters * 8 / 8 / GIB, abs=0.01)
    # 6 per weight but for the embedding's, and 12 · 32 layers · 32 heads · 128 for each pair
    weights, pairs = parameters - 128_256 * 4096, 12 * 32 * 32 * 128
    for window, flops in zip((65_536, 524_288), rows["GFLOPs per token, causal"], strict=True):
        expected = 6 * weights + pairs * (window + 1) / 2
        assert float(flops.replace(",", "")) == pytest.approx(expected / 1e9, rel=1e-3)
    seconds = float(rows["seconds per step"][0].replace(",", ""))
    flops = 4_194_304 * (6 * weights + pairs * 65_537 / 2)
    assert seconds == pytest.approx(flops / (8 * 989e12 * 0.4), rel=1e-2)
    assert "epochs unknown: code_64k" in out


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_what_it_names(recipe, capsys):
    code, out, err, rows = planned(capsys, "--config", CONFIG / f"{recipe}.yaml")
    assert code == 0, err
    assert all(float(each) <= 80 for each in rows["in all"]), out


@pytest.mark.slow
def test_without_a_shape_it_ends_with_2(capsys, tmp_path):
    config = yaml.safe_load((CONFIG / "abf_32k.yaml").read_text())
    del config["plan"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    code, _, err, _ = planned(capsys, "--config", tmp_path / "config.yaml")
    assert code == 2
    assert err.count("\n") == 1
    assert "checkpoints/llama2-7b is not there: name the model's shape, --shape llama2-7b" in err
    code, _, err, _ = planned(capsys, "--config", tmp_path / "config.yaml", "--shape", "gpt")
    assert code == 2
    assert "shape 'gpt' unknown" in err


@pytest.mark.slow
def test_what_does_not_fit_ends_with_3_and_names_what_would(capsys):
    options = "--config", CONFIG / "abf_32k.yaml", "--model.init_args.recompute", "elementwise"
    code, out, err, _ = planned(capsys, *options)
    assert code == 3
    assert "window 32,768 does not fit: " in err
    assert "any of these would: recompute block;" in err
    assert "in all" in out  # the table is there all the same
    code, *_ = planned(capsys, *options[:2], "--model.init_args.recompute", "block")
    assert code == 0


@pytest.mark.slow
def test_the_fewest_gpus(capsys):
    options = "--config", CONFIG / "abf_32k.yaml", "--solve", "gpus"
    code, out, *_ = planned(capsys, *options)
    assert code == 0
    (fewest,) = map(int, re.findall(r"fewest h100_80gb for window 32,768: (\d+)", out))
    code, *_ = planned(capsys, *options[:2], "--gpus", fewest)
    assert code == 0
    code, *_ = planned(capsys, *options[:2], "--gpus", fewest // 2)
    assert code == 3


@pytest.mark.slow
def test_lengths_and_epochs_are_those_of_the_data(capsys, tmp_path):
    texts = [{"text": "x" * n} for n in (50, 900, 4000)] * 30
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    prepared = ["--input", f"[{tmp_path}/texts.jsonl]", "--output", str(tmp_path / "data")]
    assert main(["prepare", *prepared, "--tokenizer", "bytes", "--chunk_tokens", "4096"]) == 0
    capsys.readouterr()
    sources = json.dumps({"texts": {"folder": str(tmp_path / "data")}})
    shape = SHAPES["smollm2-135m"]
    code, out, err, rows = planned(
        capsys, "--config", CONFIG / "quickstart.yaml", "--shape", "smollm2-135m",
        "--hardware", "cpu", "--data.init_args.sources", sources, "--data.init_args.window", 1024,
        "--model.init_args.checkpoint", tmp_path / "none",
    )  # fmt: skip
    assert code == 0, err
    read = int(rows["steps"][0]) * int(rows["tokens per step"][0].replace(",", ""))
    tokens = json.loads((tmp_path / "data/manifest.json").read_text())["splits"]["train"]["tokens"]
    assert f"source texts: {read:,} tokens, {read / tokens:,.2f} epochs" in out
    whole = 6 * 134_515_008 + 12 * shape.num_hidden_layers * 576 * 1025 / 2
    assert float(rows["GFLOPs per token, causal"][0]) < whole / 1e9  # short documents see less


@pytest.mark.slow
def test_fit_refuses_what_does_not_fit_unless_forced(monkeypatch, tmp_path):
    tiny = Hardware("cpu", 2 * 2**20, None, reserved=0)
    monkeypatch.setattr(planned_run, "named_hardware", lambda name: tiny)
    monkeypatch.setattr("sys.argv", ["lit_longctx"])  # Lightning warns of pytest's arguments
    options = ["fit", "--config", str(CONFIG / "debug_cpu.yaml")]
    options += ["--trainer.default_root_dir", str(tmp_path / "run")]
    with pytest.raises(planned_run.DoesNotFit, match=r"does not fit: .*; --force goes on"):
        fit(options)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="does not exist"):  # the data is looked for
        fit([*options, "--force", "--data.init_args.sources", '{"a": {"folder": "none"}}'])
