"""Shapes in annotations are checked in tests only: jaxtyping's import hook with beartype."""

import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; tests are small

import differences
import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("lit_longctx", "typechecker.check")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--differences", action="store_true", help="print distances to references")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Remove what the workers shared (training.runs.workshop), once the last has ended."""
    if controller := session.config.pluginmanager.getplugin("dsession"):
        folder = f"lit_longctx-{controller.nodemanager.testrunuid}"
        shutil.rmtree(Path(tempfile.gettempdir()) / folder, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.getoption("--differences"):
        terminalreporter.write_line("\n" + differences.table())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
