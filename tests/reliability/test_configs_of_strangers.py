"""What a config names is not called before it is known to be of the field's type (16)."""

from pathlib import Path

import pytest
import yaml
from training import runs

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdef", "bcdefg", strict=True)
)


def named(path: str, **arguments: object) -> dict[str, object]:
    return {"class_path": path, "init_args": arguments}


def hostile(trace: Path) -> dict[str, tuple[str, str]]:
    """Name → what is put after a config that works, and a word of the error."""
    touch = f"touch {trace}"
    position = {"model": named("ContinualPretrain", position=named("os.system", command=touch))}
    callback = {"trainer": {"callbacks": [named("subprocess.Popen", args=touch, shell=True)]}}
    logger = {"trainer": {"logger": named("os.system", command=touch)}}
    return {
        "position": (yaml.safe_dump(position), "os.system"),
        "callback": (yaml.safe_dump(callback), "subprocess.Popen"),
        "logger": (yaml.safe_dump(logger), "os.system"),
        "yaml object": (f"trainer: !!python/object/apply:os.system ['{touch}']\n", "python/object"),
        "bomb of aliases": (BOMB, ""),
        "itself": ("trainer: &t\n  logger: *t\n", ""),
        "unknown key": ("trainer: {no_such_key: 1}\n", "no_such_key"),
        "wrong type": ("trainer: {max_steps: many}\n", "max_steps"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", list(hostile(Path())))
def test_a_hostile_config_calls_nothing(name: str, tmp_path: Path):
    trace = tmp_path / "trace"
    text, word = hostile(trace)[name]
    (tmp_path / "hostile.yaml").write_text(text)
    ran = runs.fit(tmp_path / "run", "--config", tmp_path / "hostile.yaml")
    assert not trace.exists()
    assert ran.code == 1
    assert len(ran.err.splitlines()) == 1
    assert word in ran.err
