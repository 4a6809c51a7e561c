"""prepare with the model's own tokenizer, then fit."""

from math import isfinite
from pathlib import Path

from cases.against_transformers import with_weights
from cases.preparing import documents
from cases.training import trained

from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.pretraining import PretrainData, Source
from lit_longctx.training.module import ContinualPretrain


def check(case: Path, work: Path) -> None:
    model = with_weights(case / "model", work / "model")
    file = documents(work, "Notebook", "rain")
    prepare([str(file)], str(work / "data"), str(model), held_out=0.3, chunk_tokens=1024)
    data = PretrainData({"notes": Source(str(work / "data"))}, window=256, batch_tokens=256)
    assert isfinite(trained(ContinualPretrain(str(model)), data, work / "run", 1)["train/loss"])
