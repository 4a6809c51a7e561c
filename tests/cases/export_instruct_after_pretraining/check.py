"""prepare, fit (continued pretraining) and export of an instruct folder."""

import json
from pathlib import Path

from cases.against_transformers import with_weights
from cases.preparing import documents
from cases.training import trained

from lit_longctx.checkpoint import export
from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.pretraining import PretrainData, Source
from lit_longctx.training.module import ContinualPretrain


def check(case: Path, work: Path) -> None:
    model = with_weights(case / "model", work / "model")
    file = documents(work, "Notebook", "rain")
    prepare([str(file)], str(work / "data"), str(model), held_out=0.3, chunk_tokens=1024)
    data = PretrainData({"notes": Source(str(work / "data"))}, window=256, batch_tokens=256)
    trained(ContinualPretrain(str(model)), data, work / "run", 1)
    exported = export(str(work / "run"), str(work / "exported"))
    template = "chat_template.jinja"
    assert (exported / template).read_text() == (model / template).read_text()
    generation = json.loads((exported / "generation_config.json").read_text())
    assert sorted(generation.pop("eos_token_id")) == [1, 4, 5]
    start = json.loads((model / "generation_config.json").read_text())
    del start["eos_token_id"]
    assert generation.items() >= start.items()
