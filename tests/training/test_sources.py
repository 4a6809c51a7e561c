"""Where training data may lie, and what it must agree on with the model it trains."""

import json
from pathlib import Path

import pytest
import tokenizers
import yaml
from tokenizers import models, pre_tokenizers
from training import runs

from lit_longctx.data.making.prepare import prepare

FITTING = ["--trainer.max_steps", 5, "--checkpoints.every_n_steps", 5]


def config_of(sources: dict[str, dict[str, object]], path: Path) -> list[str]:
    data = {"class_path": "PretrainData", "init_args": {"sources": sources}}
    path.write_text(yaml.safe_dump({"data": data}))
    return ["--config", str(path)]


@pytest.mark.slow
def test_training_from_object_storage_is_training_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two processes read the sources from an S3 server through one cache."""
    pytest.importorskip("moto")
    from data.test_remote import server_process, upload

    monkeypatch.setenv("LIT_LONGCTX_CACHE", str(tmp_path / "cache"))
    with server_process() as (_, client):
        sources = {}
        for name, source in runs.sources().items():
            upload(client, Path(source["folder"]), name)
            sources[name] = {"folder": f"s3://tokens/{name}", "weight": source["weight"]}
        remote = config_of(sources, tmp_path / "remote.yaml")
        ran = runs.fit(tmp_path / "remote", *remote, *FITTING, ranks=2).succeeded()
    assert ran.err == ""
    found, expected = runs.witnessed(ran.folder), runs.witnessed(runs.alone().folder)
    assert runs.samples(found) == runs.samples(expected)[:5]
    losses = runs.losses(expected)[:5]
    assert runs.largest_difference(runs.losses(found), losses) <= 1e-6
    assert (tmp_path / "remote" / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_data_of_another_tokenizer_than_the_checkpoints_is_refused(tmp_path: Path):
    vocab = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, 200)}}
    model = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="w2"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save(str(tmp_path / "tokenizer.json"))
    rows = tmp_path / "a.jsonl"
    rows.write_text("".join(json.dumps({"text": f"w{i} " * 300}) + "\n" for i in range(2, 60)))
    folder, coder = tmp_path / "words", str(tmp_path / "tokenizer.json")
    prepare(str(rows), str(folder), coder, chunk_tokens=4096, bos="<s>", eos="</s>")
    options = config_of({"words": {"folder": str(folder)}}, tmp_path / "words.yaml")
    start = ["--model.init_args.config", "null", "--model.init_args.checkpoint"]
    ran = runs.fit(tmp_path / "run", *options, *FITTING, *start, runs.alone().folder)
    assert ran.code == 1
    (line,) = ran.err.splitlines()
    assert "data has a tokenizer of fingerprint" in line
    assert f"prepare the data with --tokenizer {runs.alone().folder / 'tokenizer'}" in line
    same = runs.fit(tmp_path / "same", *FITTING, *start, runs.alone().folder)
    assert same.code == 0, same.err
