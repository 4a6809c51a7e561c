"""One row whose document is far longer than the window, in steps of two rows: one is padding."""

from math import isfinite
from pathlib import Path

from cases.preparing import prepared
from cases.training import trained

from lit_longctx.data.finetuning import ChatSource, FinetuneData
from lit_longctx.model import LlamaConfig
from lit_longctx.training.module import SFT

CONFIG = LlamaConfig(258, 16, 16, num_hidden_layers=1, num_attention_heads=2)


def check(case: Path, work: Path) -> None:
    prepared(case / "rows.jsonl", work / "data", chat=True)
    data = FinetuneData({"long": ChatSource(str(work / "data"))}, window=256, batch_tokens=512)
    found = trained(SFT(config=CONFIG), data, work / "run", 2)
    assert isfinite(found["train/loss"])
    assert 0 < found["train/loss"] < 10
    assert isfinite(found["train/grad_norm"])
