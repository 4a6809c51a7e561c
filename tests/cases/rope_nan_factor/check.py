from pathlib import Path

from cases.against_transformers import refused

from lit_longctx.checkpoint.hugging_face import read_config


def check(case: Path, work: Path) -> None:
    assert "factor" in refused(lambda: read_config(case))
