"""Every window of an epoch: EOS as a target, and documents of one token."""

from pathlib import Path

from cases.preparing import documents

from lit_longctx.data.making.prepare import prepare
from lit_longctx.data.pretraining import PretrainData, Source
from lit_longctx.data.store.windows import Windows

WINDOW = 256


def check(case: Path, work: Path) -> None:
    tokenizer = str(case / "tokenizer")
    file = documents(work, "Notebook", "rain")
    prepare([str(file)], str(work / "out"), tokenizer, held_out=0.0, chunk_tokens=1024)
    data = PretrainData({"p": Source(str(work / "out"))}, window=WINDOW, batch_tokens=1024)
    (reader,) = data.readers(data.longest).values()
    rows = [(0, i, i) for i in range(len(reader))]
    batch = data.batch({0: reader}, rows, training=True)
    eos = data.tokenizer.eos
    lengths = Windows(str(work / "out"), "train", WINDOW).document_lengths()
    ends = lengths.cumsum() - 1  # of each document, the last token, which is EOS
    inside = int((ends <= len(reader) * WINDOW).sum())
    assert int((batch.labels == eos).sum()) == inside
    assert inside > 50
    assert int((batch.documents.boundaries.diff() == 1).sum()) == 0
