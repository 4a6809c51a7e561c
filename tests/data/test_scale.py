"""Parts prepared by datatrove's executors and joined are what one process prepares."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from lit_longctx import cli, manifest
from lit_longctx.data.making.interleave import Interleave
from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.making.scale import Executor, join, part_folder
from lit_longctx.data.reading.documents import DocumentReader
from lit_longctx.data.reading.faults import Faults

pytestmark = pytest.mark.slow

pytest.importorskip("datatrove")

FILES, PARTS = 7, 3


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Seven files of documents of many lengths, one with a broken line."""
    folder = tmp_path_factory.mktemp("texts") / "texts"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(FILES):
        rows = [{"text": "x" * int(n)} for n in generator.integers(1, 3000, 40)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{i}.jsonl").write_text(lines + ("broken\n" if i == 4 else ""))
    return folder


SETTINGS = {"held_out": 0.1, "chunk_tokens": 4096, "tolerated": 0.1}


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    prepare(str(texts), str(folder), **SETTINGS)
    return folder


@pytest.fixture
def parts(texts, tmp_path):
    """Three parts, each prepared by itself as a line of a job array would."""
    folders = [part_folder(tmp_path / "out.parts", part) for part in range(PARTS)]
    for part, folder in enumerate(folders):
        prepare(str(texts), str(folder), **SETTINGS, part=part, parts=PARTS)
    return folders


def same(found, expected):
    """Whether two folders hold the same data, by the bytes of their files."""
    names = {"train", "held_out", "tokenizer"}
    for folder in (found, expected):
        assert {p.name for p in folder.iterdir()} == names | {manifest.NAME}
    files = [p.relative_to(expected) for p in expected.rglob("*") if p.is_file()]
    assert len(files) > 20
    for file in files:
        if file.name not in ("index.json", manifest.NAME):  # litdata's index holds the time
            assert (found / file).read_bytes() == (expected / file).read_bytes(), file
    ours, theirs = manifest.verify(found), manifest.verify(expected)
    return all(ours[name] == theirs[name] for name in ("splits", "broken", "tokenizer", "part"))


def test_parts_joined_are_the_whole_byte_for_byte(parts, whole, tmp_path):
    join(parts, tmp_path / "out")
    assert same(tmp_path / "out", whole)


def test_parts_share_no_file_and_leave_none_out(parts):
    counts = [manifest.read(folder)["splits"] for folder in parts]
    assert [sum(s["documents"] for s in part.values()) for part in counts] == [80, 80, 120]


@pytest.mark.slow
def test_the_local_executor_prepares_what_is_missing_and_joins(texts, whole, tmp_path, capfd):
    executor = Executor(options={"tasks": PARTS, "workers": 2})
    output = tmp_path / "out"
    found = prepare(str(texts), str(output), **SETTINGS, executor=executor)
    assert found is not None
    assert same(output, whole)
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out.parts").iterdir()}
    shutil.rmtree(output)
    shutil.rmtree(tmp_path / "out.parts" / "00001")  # lost: it alone is made again
    alone = Executor(options={"tasks": PARTS, "workers": 1})  # in this process, which is quicker
    prepare(str(texts), str(output), **SETTINGS, executor=alone)
    assert same(output, whole)
    now = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out.parts").iterdir()}
    assert [name for name in ("00000", "00001", "00002") if now[name] != kept[name]] == ["00001"]


class Queue:
    """An executor that only queues, as Slurm's does; a test runs the ranks later."""

    queued = None

    def __init__(self, pipeline, logging_dir, tasks):
        Queue.queued = pipeline[0]

    def run(self):
        pass


def test_parts_that_are_still_queued_are_waited_for(texts, whole, tmp_path, capsys):
    executor = Executor(f"{__name__}.Queue", {"tasks": PARTS})
    again = partial(prepare, str(texts), str(tmp_path / "out"), **SETTINGS, executor=executor)
    assert again() is None
    assert "0 of 3 parts are in" in capsys.readouterr().out
    for rank in (2, 0):
        Queue.queued(None, rank, PARTS)
    assert again() is None
    assert "2 of 3 parts are in" in capsys.readouterr().out
    Queue.queued(None, 1, PARTS)
    assert again() is not None
    assert same(tmp_path / "out", whole)


def test_a_part_that_fails_stops_the_run_and_nothing_is_joined(texts, tmp_path):
    executor = Executor(options={"tasks": PARTS, "workers": 1})
    with pytest.raises(ValueError, match=r"1 of \d+ documents are broken"):
        prepare(str(texts), str(tmp_path / "out"), executor=executor, tolerated=0.0)
    assert not (tmp_path / "out").exists()


def test_from_the_command_line(texts, whole, tmp_path):
    config = tmp_path / "prepare.yaml"
    executor = {"options": {"tasks": 2, "workers": 1}}
    content = {"input": str(texts), "output": str(tmp_path / "out"), "executor": executor}
    config.write_text(json.dumps({**content, **SETTINGS}))
    assert cli.main(["prepare", "--config", str(config)]) == 0
    assert same(tmp_path / "out", whole)


def test_a_missing_part_is_refused(parts, tmp_path):
    shutil.rmtree(parts[1])
    with pytest.raises(ValueError, match=r"00001 is missing; prepare it, then join again"):
        join(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_altered_part_is_refused(parts, tmp_path):
    chunk = parts[2] / "train" / "chunk-0-1.bin"
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(ValueError, match=r"chunk-0-1.bin is altered.*; remove .*00002 and run"):
        join(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_of_another_number_of_parts_is_refused(texts, parts, tmp_path):
    shutil.rmtree(parts[0])
    prepare(str(texts), str(parts[0]), **SETTINGS, part=0, parts=4)
    with pytest.raises(ValueError, match=r"00000 is part 0 of 4, expected 0 of 3"):
        join(parts, tmp_path / "out")


def test_a_part_prepared_otherwise_is_refused(texts, parts, tmp_path):
    shutil.rmtree(parts[2])
    other = {**SETTINGS, "interleave": Interleave()}
    prepare(str(texts), str(parts[2]), **other, part=2, parts=PARTS)
    with pytest.raises(ValueError, match=r"00002 was prepared otherwise than .*00000: expected"):
        join(parts, tmp_path / "out")


@pytest.mark.parametrize(
    "other", [{"held_out": 0.5}, {"reader": DocumentReader(text_field="text", largest=9000)}]
)
def test_parts_of_different_runs_are_refused(texts, parts, tmp_path, other):
    shutil.rmtree(parts[2])
    prepare(str(texts), str(parts[2]), **{**SETTINGS, **other}, part=2, parts=PARTS)
    with pytest.raises(ValueError, match=r"00002 was prepared otherwise than .*00000: expected"):
        join(parts, tmp_path / "out")


def test_a_file_that_came_between_two_parts_is_noticed(texts, parts, tmp_path):
    grown = tmp_path / "texts"
    shutil.copytree(texts, grown)
    shutil.copy(texts / "3.jsonl", grown / "3b.jsonl")
    shutil.rmtree(parts[2])
    prepare(str(grown), str(parts[2]), **SETTINGS, part=2, parts=PARTS)
    with pytest.raises(ValueError, match=r"00002 was prepared otherwise.*units"):
        join(parts, tmp_path / "out")


def test_repositories_have_the_same_names_in_parts(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "x").mkdir(parents=True)
        (tmp_path / name / "x" / "f.py").write_text(f"{name} = 1\n" * 50)
    inputs = [f"code:{tmp_path / name}" for name in ("a", "b")]
    whole = [d.id for d in DocumentReader().documents(inputs, Faults())]
    found = [d.id for part in (0, 1) for d in DocumentReader().documents(inputs, Faults(), part, 2)]
    assert found == whole == ["x", "x#2"]


def test_no_parts_at_all_are_refused(texts, tmp_path):
    with pytest.raises(ValueError, match="executor's tasks 0 must be 1 or more"):
        prepare(str(texts), str(tmp_path / "out"), executor=Executor(options={"tasks": 0}))


def test_tokens_that_do_not_add_up_are_refused(parts, tmp_path):
    content = manifest.read(parts[0])
    content["splits"]["train"]["text_tokens"] += 1
    files = {name: entry["sha256"] for name, entry in content.pop("files").items()}
    manifest.seal(parts[0], files, **content)
    with pytest.raises(ValueError, match=r"the parts hold \d+ text_tokens, joined they are"):
        join(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_parts_than_files_are_refused(texts, tmp_path):
    with pytest.raises(ValueError, match="8 parts are too many for 7 files"):
        prepare(str(texts), str(tmp_path / "out"), part=0, parts=8)


@pytest.mark.parametrize("path", ["datatrove.executor.NoSuch", "no_such.Executor", "Nameless"])
def test_an_unknown_executor_is_refused(texts, tmp_path, path):
    with pytest.raises(ValueError, match=f"executor {path} not found"):
        prepare(str(texts), str(tmp_path / "out"), executor=Executor(path, {"tasks": 1}))


@pytest.mark.slow
def test_slurm_is_given_a_job_array_whose_lines_prepare_the_parts(
    texts, whole, tmp_path, monkeypatch, capsys
):
    """`sbatch` is a stand-in that takes the job; its lines are then run as Slurm would."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, answer in {"sbatch": "Submitted batch job 17", "scontrol": "node1"}.items():
        (binaries / name).write_text(f"#!/bin/sh\necho {answer}\n")
        (binaries / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    options = {"tasks": 2, "time": "01:00:00", "partition": "cpu"}
    executor = Executor("datatrove.executor.SlurmPipelineExecutor", options)
    again = partial(prepare, str(texts), str(tmp_path / "out"), **SETTINGS, executor=executor)
    assert again() is None
    logs = tmp_path / "out.parts" / "logs"
    script = (logs / "launch_script.slurm").read_text()
    assert "#SBATCH --array=0-1" in script
    assert f"launch_pickled_pipeline {logs}/executor.pik" in script
    for line in range(2):
        place = {"SLURM_NODELIST": "node1", "SLURM_ARRAY_TASK_ID": str(line), "RUN_OFFSET": "0"}
        job = ["launch_pickled_pipeline", f"{logs}/executor.pik"]
        subprocess.run(job, env={**os.environ, **place}, check=True, capture_output=True)
    assert again() is not None
    assert same(tmp_path / "out", whole)
