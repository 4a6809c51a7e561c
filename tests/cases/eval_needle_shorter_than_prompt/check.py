"""lit_longctx evaluate --tasks [needle] --grid.lengths [16]."""

import re
from pathlib import Path

from cases.against_transformers import refused, with_weights
from cases.preparing import documents, prepared

from lit_longctx.evaluation.evaluate import evaluate
from lit_longctx.evaluation.retrieval.grid import Grid


def check(case: Path, work: Path) -> None:
    prepared(documents(work, "Notebook", "rain"), work / "data", held_out=0.3)
    model = with_weights(case.parent / "rope_null_scaling", work / "model")
    arguments = [str(model)], [str(work / "data")], str(work / "out"), ["needle"]
    message = refused(lambda: evaluate(*arguments, grid=Grid(lengths=[16])))
    assert re.search(r"length 16 is shorter than the prompt: .* ask for \d+ or more", message)
