from pathlib import Path

from cases.against_transformers import refused, with_weights

from lit_longctx.generate import generate_text


def check(case: Path, work: Path) -> None:
    model = with_weights(case.parent / "export_instruct_after_pretraining" / "model", work)
    assert "prompt" in refused(lambda: generate_text(str(model), "a\ud800", 2))
