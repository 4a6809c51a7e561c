"""Two files model-0000k-of-00002.safetensors; the config is that of another case."""

from pathlib import Path

from cases.against_transformers import refused, with_weights
from safetensors.torch import load_file, save_file

from lit_longctx.checkpoint import load_pretrained


def check(case: Path, work: Path) -> None:
    folder = with_weights(case.parent / "rope_null_scaling", work)
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(whole)
    for number, part in enumerate((names[:10], names[10:]), 1):
        file = folder / f"model-{number:05d}-of-00002.safetensors"
        save_file({name: whole[name] for name in part}, file)
    message = refused(lambda: load_pretrained(folder))
    assert "model.safetensors.index.json" in message
    assert "convert" not in message
