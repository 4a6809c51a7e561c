"""What comes in with a folder, and what goes out: every file by its hash, every number by name."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import edit, tiny, unsealed
from training import runs

from lit_longctx import cli, manifest
from lit_longctx.checkpoint import export, export_pretrained, load_pretrained, open_checkpoint
from lit_longctx.data.tokens.opening import open_tokenizer
from lit_longctx.data.tokens.tokenizer import ByteTokenizer
from lit_longctx.model import LlamaConfig

UP = "model.layers.1.mlp.up_proj.weight"


def flip(file: Path, generator: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    file.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_pretrained(tiny(), tmp_path_factory.mktemp("out") / "hf", ByteTokenizer())


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "hf"))


def test_every_flipped_bit_of_an_export_is_refused(exported: Path, tmp_path: Path):
    generator = random.Random(0)
    for file in sorted(exported.iterdir()):
        for _ in range(6):
            copy = Path(shutil.copytree(exported, tmp_path / "copy"))
            flip(copy / file.name, generator)
            with pytest.raises(ValueError, match=file.name) as found:
                load_pretrained(copy)
            assert "\n" not in str(found.value)
            shutil.rmtree(copy)
    load_pretrained(exported)


def test_a_folder_that_its_user_changed_says_how_to_go_on(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    with pytest.raises(ValueError, match=rf"changed it yourself, remove {folder}/manifest.json$"):
        open_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / manifest.NAME).unlink()
    load_pretrained(folder)
    (folder / manifest.NAME).write_text('{"name": "another program\'s"}')
    load_pretrained(folder)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs.alone().folder, tmp_path / "run"))


def test_every_flipped_bit_of_a_runs_tokenizer_is_refused(run: Path, tmp_path: Path):
    files = sorted((run / "tokenizer").iterdir())
    assert manifest.NAME in {file.name for file in files}
    generator = random.Random(0)
    for file in files:
        for _ in range(4):
            whole = file.read_bytes()
            flip(file, generator)
            for given in (run, run / "checkpoints" / "step-00000030"):
                with pytest.raises(ValueError, match=rf"tokenizer/{file.name} is "):
                    export(str(given), str(tmp_path / "out"))
            file.write_bytes(whole)
    export(str(run), str(tmp_path / "out"))


def test_a_tokenizer_that_a_folder_lists_is_compared_whoever_opens_it(tmp_path: Path):
    data = Path(shutil.copytree(runs.sources()["code"]["folder"], tmp_path / "data"))
    file = data / "tokenizer" / "tokenizer_config.json"
    open_tokenizer(str(data / "tokenizer"))
    file.write_text(file.read_text().replace("<eos>", "<bos>"))
    said = r"tokenizer_config.json is altered: .* remove .*data/manifest.json$"
    for call in (
        lambda: open_tokenizer(str(data / "tokenizer")),
        lambda: export_pretrained(tiny(), tmp_path / "out", data / "tokenizer"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_goes_on_leaves_its_tokenizer_as_it_is(run: Path):
    before = (run / "tokenizer").stat().st_mtime_ns
    runs.fit(run, "--ckpt_path", "last", "--trainer.max_steps", 31).succeeded()
    assert (run / "tokenizer").stat().st_mtime_ns == before


# ---- weights


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_finite_number_is_refused(folder: Path, tmp_path: Path, value: float):
    weights = load_file(unsealed(folder) / "model.safetensors")
    weights[UP][3, 4] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"^{folder}: {UP} \(1 weights\) holds NaN, infinity or"):
        load_pretrained(folder)
    llama = tiny()
    with torch.no_grad():
        llama.get_parameter(UP)[3, 4] = value
    with pytest.raises(ValueError, match=rf"^{UP} holds NaN or infinity"):
        export_pretrained(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_dtype_cannot_hold_is_refused_by_name(tmp_path: Path):
    llama = tiny()
    for value, fits in ((65_504.0, True), (65_536.0, False)):  # float16 ends between them
        with torch.no_grad():
            llama.get_parameter(UP)[0, 0] = value
        target = tmp_path / str(fits)
        if fits:
            export_pretrained(llama, target, dtype=torch.float16)
            assert float(load_file(target / "model.safetensors")[UP][0, 0]) == value
        else:
            with pytest.raises(ValueError, match=rf"^{UP} reaches 6.554e\+04, beyond the 6.55e"):
                export_pretrained(llama, target, dtype=torch.float16)
            assert not target.exists()
    folder = export_pretrained(llama, tmp_path / "whole")
    with pytest.raises(ValueError, match=rf"{UP} .* numbers beyond float16"):
        open_checkpoint(folder).load(dtype=torch.float16)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rms_norm_eps", value) for value in (-1, 0, float("inf"), True)),
        *(("hidden_size", value) for value in (0, -48, True)),
        *(("num_hidden_layers", value) for value in (0, -2)),
        *((f"num_{kind}_heads", 0) for kind in ("attention", "key_value")),
        ("max_position_embeddings", -5),
    ],
)
def test_a_config_that_no_llama_can_have_is_refused_by_name(folder: Path, key: str, value: Any):
    edit(folder, **{key: value})
    said = rf"^{folder}/config.json: {key} is .*; expected "
    with pytest.raises(ValueError, match=said):
        open_checkpoint(folder)
    known = {"hidden_size": 48, "vocab_size": 9, "intermediate_size": 9}
    known |= {"num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(ValueError, match=rf"^{key} is "):
        LlamaConfig(**{**known, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("rms_norm_eps", "1e-6"), ("hidden_size", 48.0), ("tie_word_embeddings", "false")],
)
def test_a_config_of_other_types_is_refused_by_name(folder: Path, key: str, value: Any):
    edit(folder, **{key: value})  # in a process of its own: here types are checked by pytest's hook
    ran = runs.run("export", "--checkpoint", folder, "--output", folder / "out")
    assert ran.code == 1
    assert f"error: {folder}/config.json: {key} is {value!r}; expected " in ran.err


@pytest.mark.parametrize("theta", [0, -1e4, float("inf")])
def test_a_base_that_gives_no_frequencies_is_refused(folder: Path, theta: float):
    edit(folder, rope_theta=theta, rope_parameters={"rope_type": "default", "rope_theta": theta})
    with pytest.raises(ValueError, match=rf"^{folder}/config.json: .*theta .*number"):
        open_checkpoint(folder)


# ---- messages

TEXTS = ["", "{", "[]", "null", "3", '"text"', "[" * 100_000]
"""What a file of JSON may hold instead of an object."""


def opens(folder: Path, work: Path) -> None:
    export_pretrained(load_pretrained(folder), work / "again")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("text", TEXTS)
def test_a_file_without_an_object_is_named(folder: Path, tmp_path: Path, name: str, text: str):
    (unsealed(folder) / name).write_text(text)
    with pytest.raises(ValueError, match=rf"^{folder}/{name} (is no JSON|holds )") as found:
        opens(folder, tmp_path)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 3}}])
def test_an_index_without_a_map_is_named(folder: Path, tmp_path: Path, index: dict[str, Any]):
    (unsealed(folder) / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"^{folder}/model.safetensors.index.json "):
        opens(folder, tmp_path)


def described(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def change_file(file: Path) -> None:
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return change_file


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.write_text("[]"),
        described(lambda content: content.pop("config")),
        described(lambda content: content.update(config=[1])),
        described(lambda content: content["config"].update(rms_norm_eps=-1)),
        described(lambda content: content["config"].update(unknown=1)),
        described(lambda content: content.pop("position")),
        described(lambda content: content["position"].update(init_args={"theta": 0})),
        described(lambda content: content["position"].update(init_args=["theta"])),
        described(lambda content: content.update(context="long")),
        described(lambda content: content.update(started_from=3)),
    ],
)
def test_a_runs_description_of_no_model_is_named(run: Path, change: Callable[[Path], None]):
    step = run / "checkpoints" / "step-00000030"
    change(step / "model.json")
    (step / manifest.NAME).unlink()
    manifest.seal(step, manifest.hash_files(step))
    with pytest.raises(ValueError, match=rf"^{step}/model.json (describes no model|holds a list)"):
        open_checkpoint(step)


def test_weights_of_meta_that_are_none_are_named(tmp_path: Path, capsys: Any):
    (tmp_path / "consolidated.00.pth").write_bytes(b"PK torn")
    (tmp_path / "params.json").write_text("[]")
    given = ["export", "--checkpoint", str(tmp_path), "--output", str(tmp_path / "out")]
    for text, name in (("[]", "params.json holds a list"), ("{}", "consolidated.00.pth is torn")):
        (tmp_path / "params.json").write_text(text)
        assert cli.main(given) == 1
        assert f"error: {tmp_path}/{name}" in capsys.readouterr().err
