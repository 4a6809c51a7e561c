"""Every back end against softmax written out in float64."""

import inspect
import sys
from types import SimpleNamespace

import flash_stand_in
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, varlen

from lit_longctx.batch import documents_from_starts, one_document
from lit_longctx.model import attention, kernels
from lit_longctx.model.attention import attention_backend, automatic
from lit_longctx.model.kernels import FlexAttention, activate_newest_flash
from lit_longctx.model.sdpa import SDPA


def by_hand(q, k, v, query_ids, key_ids, scale, window=10**9):
    """Loop over rows and heads; float64; queries are the last places of each row."""
    q, k, v = q.double(), k.double(), v.double()
    batch, num_queries, heads, _ = q.shape
    num_keys, kv_heads = k.shape[1:3]
    out = torch.empty(batch, num_queries, heads, v.shape[-1], dtype=torch.float64)
    past = num_keys - num_queries
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // kv_heads)
            for i in range(num_queries):
                nearest = range(max(0, past + i + 1 - window), past + i + 1)
                seen = [j for j in nearest if key_ids[b, j] == query_ids[b, i]]
                probs = (k[b, seen, g] @ q[b, i, h] * scale).softmax(0)
                out[b, i, h] = probs @ v[b, seen, g]
    return out


def packed(rows, tokens, share=0.1, seed=0):
    starts = torch.rand(rows, tokens, generator=torch.Generator().manual_seed(seed)) < share
    starts[:, 0] = True
    return documents_from_starts(starts)


def heads(rows, tokens, number, dim):
    return torch.randn(rows, tokens, number, dim)


BACKENDS = {"sdpa": SDPA, "flex_attention": FlexAttention}


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("value_dim", [16, 8])
def test_packed_rows(name, q_heads, kv_heads, value_dim):
    documents = packed(2, 40)
    q, k, v = (
        heads(2, 40, q_heads, 16),
        heads(2, 40, kv_heads, 16),
        heads(2, 40, kv_heads, value_dim),
    )
    backend = attention_backend(name)
    out = backend.attend(q, k, v, backend.prepare(documents, documents), 0.3)
    expected = by_hand(q, k, v, documents.ids, documents.ids, 0.3)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_one_document_per_row(name):
    documents = one_document(2, 24)
    q, k, v = heads(2, 24, 4, 8), heads(2, 24, 2, 8), heads(2, 24, 2, 8)
    backend = attention_backend(name)
    out = backend.attend(q, k, v, backend.prepare(documents, documents), 0.5)
    expected = by_hand(q, k, v, documents.ids, documents.ids, 0.5)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("name", BACKENDS)
def test_more_keys_than_queries(name, new, gradient):
    queries, keys = one_document(2, new), one_document(2, 30)
    q, k, v = heads(2, new, 4, 8), heads(2, 30, 2, 8), heads(2, 30, 2, 8)
    backend = attention_backend(name)
    with torch.set_grad_enabled(gradient):
        out = backend.attend(q, k, v, backend.prepare(queries, keys), 0.5)
    expected = by_hand(q, k, v, queries.ids, keys.ids, 0.5)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize(
    ("name", "together"),
    [("sdpa", 4), ("sdpa", 256), pytest.param("flex_attention", 256, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("window", [1, 7, 24, 100])
def test_a_sliding_window(name, together, window, monkeypatch):
    """Packed rows, one document a row, and a cache; blocks of queries are longer or shorter."""
    monkeypatch.setattr(SDPA, "together", together)
    backend = attention_backend(name)
    for queries, keys in (
        (packed(2, 90, share=0.04), None),
        (one_document(2, 50), None),
        (one_document(2, 9), one_document(2, 60)),
        (one_document(2, 1), one_document(2, 60)),
    ):
        keys = queries if keys is None else keys
        (rows, now), seen = queries.ids.shape, keys.ids.shape[1]
        q, k, v = heads(rows, now, 4, 8), heads(rows, seen, 2, 8), heads(rows, seen, 2, 8)
        out = backend.attend(q, k, v, backend.prepare(queries, keys, window), 0.5)
        expected = by_hand(q, k, v, queries.ids, keys.ids, 0.5, window)
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


def test_a_mask_that_was_made_without_gradient_serves_a_pass_with_one():
    queries, keys = one_document(1, 5), one_document(1, 30)
    with torch.no_grad():
        mask = SDPA().prepare(queries, keys)
    inputs = [heads(1, n, 2, 8).requires_grad_() for n in (5, 30, 30)]
    expected = by_hand(*inputs, queries.ids, keys.ids, 0.5).square().sum()
    found = SDPA().attend(*inputs, mask, 0.5).square().sum()
    for ours, theirs in zip(
        *(torch.autograd.grad(x, inputs) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs.to(ours.dtype))


def test_gradients_of_a_sliding_window(monkeypatch):
    monkeypatch.setattr(SDPA, "together", 4)
    documents = packed(2, 40, share=0.1)
    q, k, v = (heads(2, 40, 2, 8).requires_grad_() for _ in range(3))
    backend = SDPA()
    out = backend.attend(q, k, v, backend.prepare(documents, documents, 6), 0.4)
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), upstream)
    reference = by_hand(q, k, v, documents.ids, documents.ids, 0.4, 6)
    expected = torch.autograd.grad(reference, (q, k, v), upstream.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=0)


def test_a_window_costs_length_times_window_and_one_mask():
    documents = one_document(1, 100_000)
    segments = SDPA().prepare(documents, documents, 512)
    products = sum(q * k for q, k in zip(segments.queries, segments.keys, strict=True))
    assert products < 2.1 * 100_000 * 512
    storages = {mask.untyped_storage().data_ptr() for mask in segments.masks}
    assert len(storages) == 1  # every block's mask is a corner of the same


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["flash_attention_2", "varlen", "older varlen"])
def test_variable_length_kernels_are_given_what_they_take(name, deterministic, monkeypatch):
    """Dtype, strides, int32 offsets, head dimension, signature: the stand-ins refuse all else."""
    package = SimpleNamespace(flash_attn_varlen_func=flash_stand_in.flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    older = name == "older varlen"
    kernel = flash_stand_in.older_varlen_attn if older else flash_stand_in.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 0))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    backend = attention_backend(name.removeprefix("older "))
    for queries, keys in (
        (packed(2, 60, share=0.05), None),
        (one_document(2, 5), one_document(2, 30)),
    ):
        keys = queries if keys is None else keys
        (rows, now), seen = queries.ids.shape, keys.ids.shape[1]
        q = heads(rows, now, 4, 16).bfloat16()
        k, v = heads(rows, seen, 2, 16).bfloat16(), heads(rows, seen, 2, 8).bfloat16()
        for window in (None, 1, 12):
            out = backend.attend(q, k, v, backend.prepare(queries, keys, window), 0.5)
            expected = by_hand(q, k, v, queries.ids, keys.ids, 0.5, window or 10**9)
            torch.testing.assert_close(out, expected.bfloat16(), rtol=2**-7, atol=1e-6)


def test_the_stand_in_has_the_signature_of_this_torch():
    ours, theirs = (inspect.signature(f) for f in (flash_stand_in.varlen_attn, varlen.varlen_attn))
    assert list(ours.parameters) == list(theirs.parameters)
    for name, parameter in theirs.parameters.items():
        assert ours.parameters[name].kind == parameter.kind
        assert ours.parameters[name].default == parameter.default


@pytest.mark.parametrize(
    ("capability", "device", "dtype", "head_dim", "name", "reason"),
    [
        (None, "cuda", torch.bfloat16, 64, "sdpa", "varlen runs on CUDA only"),
        ((9, 0), "cpu", torch.bfloat16, 64, "sdpa", "varlen runs on CUDA only"),
        ((7, 5), "cuda", torch.float16, 64, "sdpa", "varlen needs sm_80 or later, this is sm_75"),
        ((8, 0), "cuda", torch.bfloat16, 256, "varlen", ""),
        ((9, 0), "cuda", torch.float16, 8, "varlen", ""),
        ((9, 0), None, None, None, "varlen", ""),
        ((9, 0), "cuda", torch.float32, 64, "sdpa", "takes bfloat16 or float16, not float32"),
        ((9, 0), "cuda", torch.bfloat16, 264, "sdpa", "multiples of 8 up to 256, not 264"),
        ((9, 0), "cuda", torch.bfloat16, 60, "sdpa", "multiples of 8 up to 256, not 60"),
    ],
)
def test_auto_is_varlen_where_it_can_be(
    capability, device, dtype, head_dim, name, reason, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    chosen, why = automatic(device, dtype, head_dim)
    assert chosen == name
    assert (reason in why) if reason else why == ""


def test_auto_chooses_when_the_tensors_come(monkeypatch, capsys):
    """By dtype and head dimension; each choice is made, and said, once."""
    found, made = [], []

    def chosen(device, dtype, head_dim):
        found.append((device.type, dtype, head_dim))
        return "sdpa", ""

    monkeypatch.setattr(attention, "automatic", chosen)
    real = SDPA.prepare
    monkeypatch.setattr(SDPA, "prepare", lambda *args: made.append(args) or real(*args))
    backend = attention_backend("auto")
    documents = packed(2, 40)
    mask = backend.prepare(documents, documents, 7)
    assert made == []
    for dim in (8, 8, 16):
        q, k = heads(2, 40, 4, dim), heads(2, 40, 2, dim)
        out = backend.attend(q, k, k, mask, 0.3)
        expected = by_hand(q, k, k, documents.ids, documents.ids, 0.3, 7)
        torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
    assert found == [("cpu", torch.float32, 8), ("cpu", torch.float32, 16)]
    assert len(made) == 1


@pytest.mark.parametrize(
    ("major", "installed", "expected"),
    [
        (8, {"FA3", "FA4"}, "FA2"),
        (9, {"FA3", "FA4"}, "FA3"),
        (9, {"FA4"}, "FA4"),
        (10, {"FA3", "FA4"}, "FA4"),
        (9, set(), "FA2"),
    ],
)
def test_newer_flash_is_used_where_installed(major, installed, expected, monkeypatch):
    """As torch's registry does: the implementation's module is imported when it is activated."""
    active = []

    def activate(name):
        if name not in installed:
            raise ModuleNotFoundError(f"No module named for {name}")
        active.append(name)

    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", activate)
    assert activate_newest_flash(major) == expected
    assert active == ([] if expected == "FA2" else [expected])


@pytest.mark.parametrize("flash", ["FA2", "FA3"])
def test_a_newer_flash_goes_before_cudnn_and_fa2_after_it(flash, monkeypatch):
    """Which of them varlen_attn takes, as torch itself selects."""
    order = []

    def kernel(q, *rest, **options):
        order.extend(varlen._get_sdp_priority_order())
        return q

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(kernels, "activate_newest_flash", lambda _: flash)
    backend = attention_backend("varlen")
    documents, q = one_document(1, 8), heads(1, 8, 2, 8)
    backend.attend(q, q, q, backend.prepare(documents, documents), 1.0)
    names = [SDPBackend(number).name for number in order if number >= 0]
    expected = ["FLASH_ATTENTION", "CUDNN_ATTENTION"]
    found = [name for name in names if name in expected]
    assert found == (expected if flash == "FA3" else expected[::-1])


@pytest.mark.parametrize("together", [1, 7, 64, 10_000])
def test_how_short_documents_are_grouped_changes_nothing(together):
    documents = packed(3, 50, share=0.2)
    q, k, v = heads(3, 50, 4, 8), heads(3, 50, 2, 8), heads(3, 50, 2, 8)
    backend = SDPA()
    backend.together = together
    out = backend.attend(q, k, v, backend.prepare(documents, documents), 0.5)
    expected = by_hand(q, k, v, documents.ids, documents.ids, 0.5)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


def test_packing_costs_the_sum_of_squares_and_no_dense_mask(monkeypatch):
    """64 documents of 512: 1/64 of the products of one document of 32,768."""
    tokens, documents = 32_768, 64
    starts = torch.zeros(1, tokens, dtype=torch.bool)
    starts[0, :: tokens // documents] = True
    structure = documents_from_starts(starts)
    backend = SDPA()
    segments = backend.prepare(structure, structure)
    assert all(mask is None for mask in segments.masks)
    q = heads(1, tokens, 1, 8)
    products = 0
    real = F.scaled_dot_product_attention

    def counted(q, k, v, **options):
        nonlocal products
        products += q.shape[0] * q.shape[-2] * k.shape[-2]
        return real(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    backend.attend(q, q, q, segments, 1.0)
    assert products == documents * (tokens // documents) ** 2


def test_masks_of_grouped_documents_stay_small():
    documents = packed(1, 20_000, share=0.2)
    segments = SDPA().prepare(documents, documents)
    assert max(mask.shape[0] for mask in segments.masks if mask is not None) <= SDPA.together
    assert sum(segments.queries) == sum(segments.keys) == 20_000


def test_gradients_flow_through_grouped_documents():
    documents = packed(2, 30, share=0.3)
    q, k, v = (heads(2, 30, 2, 8).requires_grad_() for _ in range(3))
    backend = SDPA()
    out = backend.attend(q, k, v, backend.prepare(documents, documents), 0.4)
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), upstream)
    reference = by_hand(q, k, v, documents.ids, documents.ids, 0.4)
    expected = torch.autograd.grad(reference, (q, k, v), upstream.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=5e-6, rtol=0)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'eager' unknown; expected one of \['auto', 'sdpa'"):
        attention_backend("eager")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_kernel_names_the_alternative():
    with pytest.raises(ImportError, match=r"needs the flash-attn package.*or 'sdpa'"):
        attention_backend("flash_attention_2")
    with pytest.raises(ValueError, match=r"runs on CUDA only; use 'sdpa'"):
        attention_backend("varlen")


def test_flex_says_that_it_cannot_train_on_the_cpu():
    documents = one_document(1, 8)
    q = heads(1, 8, 2, 8).requires_grad_()
    backend = attention_backend("flex_attention")
    with pytest.raises(ValueError, match="no backward pass on the CPU"):
        backend.attend(q, q, q, backend.prepare(documents, documents), 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["auto", "sdpa", "flash_attention_2", "varlen", "flex_attention"])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(8, 8), (8, 2)])
def test_kernels_on_cuda(name, q_heads, kv_heads):
    documents = packed(2, 512, share=0.02)
    q, k, v = heads(2, 512, q_heads, 64), heads(2, 512, kv_heads, 64), heads(2, 512, kv_heads, 64)
    expected = by_hand(q, k, v, documents.ids, documents.ids, 0.125)
    on_device = documents._replace(ids=documents.ids.cuda(), boundaries=documents.boundaries.cuda())
    try:
        backend = attention_backend(name)
    except ImportError as error:
        pytest.skip(str(error))
    q, k, v = (x.cuda().bfloat16() for x in (q, k, v))
    out = backend.attend(q, k, v, backend.prepare(on_device, on_device), 0.125)
    torch.testing.assert_close(out.double().cpu(), expected, atol=3e-2, rtol=0)
