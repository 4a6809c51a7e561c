"""The exported folder in transformers 4, installed beside ours; needs the package index."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases.against_transformers import tried, with_weights

from lit_longctx.checkpoint import export_pretrained, load_pretrained
from lit_longctx.position import LongRoPE

VERSIONS = {
    "4.51.3": ["tokenizers==0.21.1", "huggingface_hub==0.30.2"],
    "4.57.1": ["tokenizers==0.22.1", "huggingface_hub==0.36.0"],
}
READ = """
import sys, transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
rotary = LlamaRotaryEmbedding(transformers.LlamaConfig.from_pretrained(sys.argv[1]))
print(transformers.__version__, rotary.attention_scaling)
"""


def check(case: Path, work: Path) -> None:
    model = with_weights(case.parent / "rope_null_scaling", work / "model")
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    position = LongRoPE(1e4, factor=4.0, original_context=512, **factors)
    exported = work / "exported"
    llama = load_pretrained(model, position=position)
    written, refusal = tried(lambda: export_pretrained(llama, exported, context=2048))
    if not written:
        assert "transformers 4" in refusal
        return
    for version, others in VERSIONS.items():
        installed = work / version
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        packages = [f"transformers=={version}", *others]
        if subprocess.run([*pip, str(installed), *packages], check=False).returncode:
            pytest.skip(f"transformers {version} cannot be installed")
        ran = subprocess.run(
            [sys.executable, "-c", READ, str(exported)],
            env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
            check=True,
        )
        found, factor = ran.stdout.split()
        assert found == version
        assert abs(float(factor) - 1.10554) < 1e-5, f"{version}: {factor}"
