"""Shapes in annotations are checked in tests only: jaxtyping's import hook with beartype."""

import os

import pytest
import torch
from jaxtyping import install_import_hook

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
install_import_hook("lit_longctx", "typechecker.check")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
