"""Compiled blocks: few graphs, whatever the layout of documents and the number of layers."""

import multiprocessing
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from training import runs

from lit_longctx.batch import pack
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE
from lit_longctx.training import parallel
from lit_longctx.training.activations import Recompute, apply_levers

CONFIG = LlamaConfig(61, 32, 48, 3, 4, 2)
LAYOUTS = 14


def compile_layouts(recompute: Recompute, tile: int | None, graphs: int) -> None:
    """Whole rows, long documents, many short ones; the losses are those of plain blocks."""
    torch.manual_seed(0)
    counter = CompileCounter()
    torch.compile = partial(torch.compile, backend=counter)
    plain, compiled = Llama(CONFIG, RoPE()), Llama(CONFIG, RoPE())
    compiled.load_state_dict(plain.state_dict())
    parallel.apply_compile(compiled)
    apply_levers(compiled, recompute, mlp_tile_tokens=tile)
    counts = []
    for layout in range(LAYOUTS):
        windows = torch.randint(2, CONFIG.vocab_size, (2, 257))
        windows[torch.rand(windows.shape) < layout * 0.02] = 1
        batch = pack(windows, bos=1)
        loss, _ = compiled.loss(batch)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(plain.loss(batch)[0].detach()), rel=1e-6)
        counts.append(counter.frame_count)
    assert counts == [graphs] * LAYOUTS, counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recompute", "tile", "graphs"),
    [
        ("elementwise", None, 4),
        ("block", None, 4),
        ("attention_kept", None, 4),
        ("block", 64, 5),
    ],
)
def test_fourteen_layouts_and_all_layers_share_few_graphs(
    recompute: Recompute, tile: int | None, graphs: int
):
    """In a process of its own: checks of shapes in annotations would be compiled too."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(runs.PRELOADED)
    process = forks.Process(target=compile_layouts, args=(recompute, tile, graphs))
    process.start()
    process.join(runs.TIMEOUT)
    assert process.exitcode == 0
