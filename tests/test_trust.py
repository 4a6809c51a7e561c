"""Folders of strangers: nothing that they name is imported or run."""

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from training import runs

from lit_longctx import cli, manifest
from lit_longctx.checkpoint import export, load_pretrained, open_checkpoint

MINE = '''
from dataclasses import dataclass
from lit_longctx.position import RoPE

@dataclass(frozen=True)
class MyRoPE(RoPE):
    """A scheme of the user's own."""
'''


class Payload:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.fixture
def step(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(runs.alone().folder, tmp_path / "run"))
    return folder / "checkpoints" / "step-00000030"


def seal(step: Path) -> None:
    """Seal a folder anew, as anyone can."""
    (step / manifest.NAME).unlink()
    manifest.seal(step, manifest.hash_files(step))


def name_position(step: Path, path: str, **arguments: Any) -> None:
    described = json.loads((step / "model.json").read_text())
    described["position"] = {"class_path": path, "init_args": arguments}
    (step / "model.json").write_text(json.dumps(described))
    seal(step)


@pytest.mark.parametrize(
    "path", ["os.system", "subprocess.run", "hostile.Scheme", "lit_longctx.position.annotations"]
)
@pytest.mark.parametrize("part", [".", "checkpoints/step-00000030"])
def test_a_class_that_a_folder_names_is_not_called(step, path, part, tmp_path, monkeypatch, capfd):
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    name_position(step, path, command=f"touch {tmp_path}/trace")
    folder = step.parents[1] / part
    for call in (
        lambda: open_checkpoint(folder),
        lambda: load_pretrained(folder),
        lambda: export(str(folder), str(tmp_path / "out")),
    ):
        with pytest.raises(ValueError, match=f"position {path} is none of lit_longctx.position's"):
            call()
    assert cli.main(["generate", "--checkpoint", str(folder), "--prompt", "a"]) == 1
    assert not (tmp_path / "trace").exists()
    assert "hostile" not in sys.modules
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_scheme_of_the_users_own_needs_trust(step, tmp_path, monkeypatch):
    (tmp_path / "my_schemes.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    name_position(step, "my_schemes.MyRoPE", theta=1e4)
    with pytest.raises(ValueError, match="--trust"):
        load_pretrained(step)
    assert "my_schemes" not in sys.modules
    assert type(load_pretrained(step, trust=True).position).__name__ == "MyRoPE"
    # imported now, by the user's will
    assert type(load_pretrained(step).position).__name__ == "MyRoPE"
    monkeypatch.delitem(sys.modules, "my_schemes")
    arguments = ["export", "--checkpoint", str(step), "--output", str(tmp_path / "out")]
    assert cli.main(arguments) == 1
    assert cli.main([*arguments, "--trust"]) == 0


def alter_metadata(step: Path, trace: Path) -> None:
    metadata = FileSystemReader(step).read_metadata()
    metadata.planner_data = Payload(trace)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(step)


def alter_value(step: Path, trace: Path) -> None:
    """Put a pickle that runs code where settings of the optimizer were."""
    metadata = FileSystemReader(step).read_metadata()
    entries = metadata.state_dict_metadata
    name = next(n for n, e in entries.items() if isinstance(e, BytesStorageMetadata))
    info = metadata.storage_data[MetadataIndex(name)]
    torch.save(Payload(trace), step / "stored")
    payload = (step / "stored").read_bytes()
    (step / "stored").unlink()
    with (step / info.relative_path).open("ab") as file:
        info.offset, info.length = file.tell(), len(payload)
        file.write(payload)
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(step)


def move_value(step: Path, trace: Path, place: str = "below/values") -> None:
    """Name a file in another folder than the harmless one of the same name."""
    metadata = FileSystemReader(step).read_metadata()
    entries = metadata.state_dict_metadata
    name = next(n for n, e in entries.items() if isinstance(e, BytesStorageMetadata))
    info = metadata.storage_data[MetadataIndex(name)]
    (step / place).parent.mkdir(exist_ok=True)
    torch.save(Payload(trace), step / place)
    torch.save(1.0, step / Path(place).name)
    info.relative_path, info.offset = place, 0
    info.length = (step / place).stat().st_size
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(step)


@pytest.mark.parametrize("outside", ["../values", "{}/values"])
def test_a_checkpoint_names_no_file_outside_of_itself(outside, step, tmp_path):
    move_value(step, tmp_path / "trace", outside.format(tmp_path))
    with pytest.raises(ValueError, match=r"\.metadata .* lists a file outside of itself"):
        load_pretrained(step)


def alter_loop(step: Path, trace: Path) -> None:
    torch.save({"loops": Payload(trace)}, step / "meta.pt")
    seal(step)


@pytest.mark.slow
@pytest.mark.parametrize("alter", [alter_value, alter_metadata, move_value, alter_loop])
def test_pickles_of_a_checkpoint_run_nothing(alter, step, tmp_path):
    alter(step, tmp_path / "trace")
    with pytest.raises(ValueError, match=r"names|holds more than values"):
        load_pretrained(step)
    ran = runs.fit(tmp_path / "on", "--ckpt_path", step)
    assert ran.code == 1
    assert "step-00000030" in ran.err
    assert not (tmp_path / "trace").exists()
    pickle.loads(pickle.dumps(Payload(tmp_path / "trace")))  # the payload is no dud
    assert (tmp_path / "trace").exists()
