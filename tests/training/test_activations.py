"""What saves memory of activations gives the losses and gradients of the plain model."""

from collections import Counter
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_longctx.batch import Batch, pack
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import YaRN
from lit_longctx.training.activations import WHOLE_BLOCKS, apply_levers, check_levers
from lit_longctx.training.memory_count import LiveBytes
from lit_longctx.training.optimizers import make_optimizer, set_learning_rate

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
RECOMPUTE = ("none", "elementwise", "attention_kept", "block")
SETTINGS = [(recompute, "none") for recompute in RECOMPUTE]
SETTINGS += [(recompute, "block_inputs") for recompute in WHOLE_BLOCKS]


def build(dtype: torch.dtype = torch.float32) -> Llama:
    llama = Llama(CONFIG, YaRN(factor=4, original_context=64))
    generator = torch.Generator().manual_seed(5)
    for weight in llama.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2, generator=generator)
    return llama.to(dtype)


def packed() -> Batch:
    tokens = torch.randint(2, 97, (2, 97), generator=torch.Generator().manual_seed(1))
    tokens[:, [0, 30]] = tokens[1, 31] = 1
    return pack(tokens, bos=1)


def step(llama: Llama, batch: Batch | None = None) -> tuple[torch.Tensor, ...]:
    loss, nats = llama.loss(batch or packed())
    loss.backward()
    return loss.detach(), nats, *(weight.grad for weight in llama.parameters())


@pytest.mark.fast_cases(6)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("recompute", "offload"), SETTINGS)
def test_recomputed_and_offloaded_blocks_are_the_same_to_the_bit(recompute, offload, dtype):
    llama = build(dtype)
    apply_levers(llama, recompute, offload)
    for _ in range(2):  # a second step finds nothing of the first
        llama.zero_grad()
        for found, expected in zip(step(llama), step(build(dtype)), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize(("recompute", "offload"), SETTINGS[1:3] + SETTINGS[-1:])
@pytest.mark.parametrize("tokens", [20, 192])
def test_a_tiled_mlp_differs_by_the_rounding_of_sums(recompute, offload, tokens):
    llama, plain = build(), build().double()
    apply_levers(llama, recompute, offload, mlp_tile_tokens=tokens)
    for found, expected in zip(step(llama), step(plain), strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_gradients_of_bfloat16_weights_are_summed_over_tiles_in_float32():
    llama = build(torch.bfloat16)
    expected = step(build(torch.bfloat16).double())
    apply_levers(llama, mlp_tile_tokens=1)
    plain = step(build(torch.bfloat16))
    names = [name for name, _ in llama.named_parameters()]
    for name, found, one, exact in zip(
        names, step(llama)[2:], plain[2:], expected[2:], strict=True
    ):
        if "mlp" in name:  # 192 tiles: sums in bfloat16 would be off by many of its roundings
            off, before = ((each - exact).norm() / exact.norm() for each in (found, one))
            assert off <= 1.5 * before


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_of_the_head_differ_by_rounding(chunk):
    llama, plain = build(), build().double()
    apply_levers(llama, head_chunk_tokens=chunk)
    for found, expected in zip(step(llama), step(plain), strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


class Calls(TorchDispatchMode):
    """Counts calls of operators."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("recompute", "times"), [("attention_kept", 1), ("block", 2)])
def test_attention_that_is_kept_is_not_computed_again(recompute, times):
    llama = build()
    apply_levers(llama, recompute)
    tokens = torch.randint(2, 97, (2, 97))
    with Calls() as calls:
        step(llama, pack(tokens, bos=1))
    kernel = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert calls.counts[kernel] == times * CONFIG.num_hidden_layers
    assert calls.counts[f"{kernel}_backward"] == CONFIG.num_hidden_layers


class Host:
    """Stands for host memory, so that live bytes are the device's."""

    def out(self, tensor):
        return None, None

    def back(self, host, tensor):
        pass

    def wait(self, copied):
        pass


def live_after_forward(layers: int, offload: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that are kept for backward of rows of 2 × 96 tokens, counted without data."""
    monkeypatch.setattr("lit_longctx.training.offload.Copies", Host)
    shape = {**vars(CONFIG), "num_hidden_layers": layers}
    with torch.device("meta"):
        llama = Llama(LlamaConfig(**shape), YaRN(factor=4, original_context=64), "sdpa")
    rows = packed()
    batch = Batch(*(x.to("meta") for x in rows[:-1]), rows.documents)
    llama.backend.prepare = lambda *_: None
    apply_levers(llama, "block", offload)
    with LiveBytes(llama.parameters()) as counted:
        loss, _ = llama.loss(batch)
        live = counted.live
        loss.backward()
    return live


@pytest.mark.slow
def test_only_block_inputs_are_kept_and_offloaded_ones_are_not(monkeypatch):
    x = 2 * 96 * CONFIG.hidden_size * 4
    kept = [live_after_forward(n, "none", monkeypatch) for n in (3, 9)]
    assert kept[1] - kept[0] == 6 * x
    kept = [live_after_forward(n, "block_inputs", monkeypatch) for n in (3, 9)]
    assert kept[1] == kept[0]


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="offload block_inputs needs recompute block or"):
        check_levers("elementwise", "block_inputs", None, None)
    with pytest.raises(ValueError, match="mlp_tile_tokens must be 1 or more; got 0"):
        check_levers("block", "none", 0, None)
    with pytest.raises(ValueError, match="head_chunk_tokens must be 1 or more; got -3"):
        check_levers("block", "none", None, -3)


# ---- optimizers


def trained(name: str, dtype_of_moments: torch.dtype | None = None) -> list[torch.Tensor]:
    """Weights after 20 steps; moments are rounded after each where a dtype is given."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(4, 6)), torch.nn.Parameter(torch.randn(6))]
    groups = [
        {"params": weights[:1], "weight_decay": 0.1},
        {"params": weights[1:], "weight_decay": 0.0},
    ]
    optimizer = make_optimizer(name, groups, 0.01, (0.9, 0.95))
    for number in range(20):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        if number == 10:  # as a resume does
            optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        for state in optimizer.state.values():
            if dtype_of_moments is not None:
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment].copy_(state[moment].to(dtype_of_moments))
    if name == "adamw_bf16_moments":
        moments = (s[m] for s in optimizer.state.values() for m in ("exp_avg", "exp_avg_sq"))
        assert {moment.dtype for moment in moments} == {torch.bfloat16}
    return [weight.detach() for weight in weights]


def test_moments_in_bfloat16_are_those_of_adamw_rounded_after_every_step():
    expected = trained("adamw", torch.bfloat16)
    for found, rounded in zip(trained("adamw_bf16_moments"), expected, strict=True):
        torch.testing.assert_close(found, rounded, atol=1e-6, rtol=0)
    exact = trained("adamw")
    assert any((a - b).abs().max() > 1e-5 for a, b in zip(exact, expected, strict=True))
    for found, best in zip(trained("adamw_bf16_moments"), exact, strict=True):
        assert (found - best).abs().max() <= 20 * 0.01 * 0.02  # 2 % of the way at most


def test_moments_in_bfloat16_refuse_a_decay_below_their_rounding():
    with pytest.raises(ValueError, match=r"cannot follow beta2 0\.999.*use 0\.9922 or less"):
        make_optimizer("adamw_bf16_moments", [{"params": [torch.ones(1)]}], 1e-3, (0.9, 0.999))


def test_8_bit_moments_need_torchao(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)
    with pytest.raises(ImportError, match=r"needs torchao: pip install 'lit_longctx\[torchao\]'"):
        make_optimizer("adamw8bit", [{"params": [torch.ones(1)]}], 1e-3, (0.9, 0.95))


@pytest.mark.slow
def test_8_bit_moments_go_about_the_way_of_adamw():
    pytest.importorskip("torchao")
    weights = []
    for name in ("adamw", "adamw8bit"):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64, 128))
        optimizer = make_optimizer(name, [{"params": [weight]}], 1.0, (0.9, 0.95))
        set_learning_rate(optimizer, 0.01)
        for _ in range(10):
            weight.grad = torch.randn_like(weight)
            optimizer.step()
        weights.append(weight.detach())
    torch.manual_seed(0)
    moved = (weights[0] - torch.randn(64, 128)).norm()
    assert (weights[1] - weights[0]).norm() <= 0.1 * moved


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("recompute", "offload", "tile"),
    [*product(RECOMPUTE, ["none"], [None, 64]), *product(WHOLE_BLOCKS, ["block_inputs"], [None])],
)
def test_a_gpu_gives_what_it_gives_without(recompute, offload, tile):
    rows = packed()
    moved = (x.cuda() if isinstance(x, torch.Tensor) else x for x in rows.documents)
    batch = Batch(*(x.cuda() for x in rows[:-1]), type(rows.documents)(*moved))
    llama, plain = build().cuda(), build().cuda()
    apply_levers(llama, recompute, offload, tile)
    for _ in range(3):
        llama.zero_grad()
        plain.zero_grad()
        for found, expected in zip(step(llama, batch), step(plain, batch), strict=True):
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
