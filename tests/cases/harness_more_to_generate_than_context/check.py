from pathlib import Path

from cases.against_transformers import refused, with_weights
from lm_eval.api.instance import Instance

from lit_longctx.evaluation.harness import HarnessModel


def check(case: Path, work: Path) -> None:
    model = with_weights(case.parent / "export_instruct_after_pretraining" / "model", work)
    asked = ("hello", {"until": ["x"], "max_gen_toks": 4096})
    harness = HarnessModel(str(model), max_length=128, device="cpu")
    message = refused(lambda: harness.generate_until([Instance("generate_until", {}, asked, 0)]))
    assert "4096" in message
    assert "128" in message
