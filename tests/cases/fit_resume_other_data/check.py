"""prepare, fit, prepare the same folder from other texts, fit --ckpt_path last."""

import shutil
from pathlib import Path

from cases.against_transformers import tried
from cases.preparing import documents, prepared, printing
from cases.training import trained

from lit_longctx.data.pretraining import PretrainData, Source
from lit_longctx.model import LlamaConfig
from lit_longctx.training.module import ContinualPretrain

CONFIG = LlamaConfig(258, 16, 16, num_hidden_layers=1, num_attention_heads=2)


def check(case: Path, work: Path) -> None:
    folder, run = work / "data", work / "run"

    def fit(steps: int, resumed: str | None = None) -> None:
        data = PretrainData({"notes": Source(str(folder))}, window=256, batch_tokens=256)
        trained(ContinualPretrain(config=CONFIG), data, run, steps, resumed)

    prepared(documents(work, "Notebook", "rain"), folder, held_out=0.3)
    fit(2)
    shutil.rmtree(folder)
    prepared(documents(work, "Ledger", "frost"), folder, held_out=0.3)
    found, refusal = tried(lambda: printing(lambda: fit(4, str(run / "checkpoints"))))
    said = found[1] if found else refusal
    assert any(word in said for word in ("notes", "manifest", "prepared")), said
