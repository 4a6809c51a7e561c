"""Which dtypes a bfloat16 training step computes, keeps and sums in, under FSDP2's policy."""

from collections.abc import Iterator
from typing import Any

import flash_stand_in
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import varlen
from training.runs import own_process_group

from lit_longctx.batch import pack
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.model.layers import LayerKind, Layers
from lit_longctx.position import NoPE, RoPE
from lit_longctx.position.xpos import XPos
from lit_longctx.training import parallel
from lit_longctx.training.activations import apply_levers

CONFIG = LlamaConfig(61, 32, 48, 3, 4, 2)
LAYERS = Layers((LayerKind(RoPE()), LayerKind(XPos(), window=9), LayerKind(NoPE())), (0, 1, 2))


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Iterator[Llama]:
    """A model for the varlen kernel, whose stand-in takes half precision only; sharded on one."""
    monkeypatch.setattr(varlen, "varlen_attn", flash_stand_in.varlen_attn)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 0))
        llama = Llama(CONFIG, LAYERS, attn_implementation="varlen")
    apply_levers(llama)
    with own_process_group():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        parallel.apply_sharding(llama, init_device_mesh("cpu", (1,)), torch.bfloat16)
        yield llama


def test_products_are_bfloat16_and_codes_and_sums_of_gradients_float32(llama: Llama):
    seen: dict[str, set[torch.dtype]] = {}

    def note(name: str, *tensors: Any) -> None:
        seen.setdefault(name, set()).update(t.dtype for t in tensors if isinstance(t, Tensor))

    def position(_: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        *before, code = inputs
        note("q and k before the position scheme", *before)
        note("code", code)
        note("q and k", *outputs)

    for block in llama.model.layers:
        block.register_forward_hook(lambda _, x, y: note("residual", x[0], y))
        block.self_attn.v_proj.register_forward_hook(lambda _, x, y: note("v", y))
        block.self_attn.position.register_forward_hook(position)
    for _ in range(2):
        windows = torch.randint(2, 61, (2, 97))
        windows[torch.rand(windows.shape) < 0.05] = 1
        loss, nats = llama.loss(pack(windows, bos=1))
        note("loss and nats", loss, nats)
        loss.backward()
    half, full = {torch.bfloat16}, {torch.float32}
    assert seen == {
        "residual": half,
        "q and k before the position scheme": half,
        "code": full,
        "q and k": half,
        "v": half,
        "loss and nats": full,
    }
    gradients = {n: p.grad.full_tensor() for n, p in llama.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(llama.parameters()))
    assert {gradient.dtype for gradient in gradients.values()} == full
    head = gradients["lm_head.weight"]
    assert (head.bfloat16().float() != head).any()  # the sum of two micro-batches is not rounded
