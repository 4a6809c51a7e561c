from pathlib import Path

from cases.against_transformers import refused
from cases.preparing import documents, prepared
from cases.training import trained

from lit_longctx.data.pretraining import PretrainData, Source
from lit_longctx.model import LlamaConfig
from lit_longctx.training.module import ContinualPretrain
from lit_longctx.training.schedule import WarmupCosine

CONFIG = LlamaConfig(258, 16, 16, num_hidden_layers=1, num_attention_heads=2)


def check(case: Path, work: Path) -> None:
    prepared(documents(work, "Notebook", "rain"), work / "data", held_out=0.3)
    data = PretrainData({"notes": Source(str(work / "data"))}, window=256, batch_tokens=256)
    module = ContinualPretrain(config=CONFIG, schedule=WarmupCosine(warmup_steps=100))
    message = refused(lambda: trained(module, data, work / "run", 4))
    assert "warmup_steps 100" in message
    assert "4 steps" in message
