"""Stand-ins for kernels that need CUDA: they refuse what those refuse, and compute in float64."""

from itertools import pairwise

import torch


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """As flash-attn 2.8: aligned bottom right; `window_size` keys to each side, −1: all."""
    assert (dropout_p, softcap, alibi_slopes, return_attn_probs, block_table) == (
        *(0.0, 0.0, None, False, None),
    )
    assert causal
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    assert type(max_seqlen_q) is type(max_seqlen_k) is int
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    assert max_seqlen_k == int(cu_seqlens_k.diff().max())
    left, right = window_size
    assert type(left) is type(right) is int
    assert right == 0
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    parts = []
    begins = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    for (a, b), (c, d) in pairwise(begins):
        i = torch.arange(c - a)[:, None] + (d - b) - (c - a)
        j = torch.arange(d - b)[None]
        seen = (j <= i) if left < 0 else (j <= i) & (j >= i - left)
        scores = torch.einsum("qhd,khd->hqk", q[a:c].double(), k[b:d].double()) * softmax_scale
        probs = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", probs, v[b:d].double()))
    return torch.cat(parts).to(q.dtype)


def check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k):
    """What mha_varlen_fwd checks of its arguments."""
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.is_contiguous()
    assert cu_seqlens_k.is_contiguous()
    assert q.ndim == k.ndim == v.ndim == 3
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape[2] == k.shape[2] == v.shape[2] <= 256
    assert q.shape[2] % 8 == 0
    assert k.shape[1] == v.shape[1]
    assert q.shape[1] % k.shape[1] == 0
    assert (cu_seqlens_q[0], cu_seqlens_q[-1]) == (0, len(q))
    assert (cu_seqlens_k[0], cu_seqlens_k[-1]) == (0, len(k))


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """As in torch 2.15."""
    assert (return_aux, seqused_k, block_table, num_splits) == (None, None, None, None)
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert scale > 0
    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        softmax_scale=scale,
        causal=True,
        window_size=window_size,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def older_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size=(-1, -1)
):
    """As in torch 2.11: as many heads of keys as of queries."""
    assert query.shape[1] == key.shape[1] == value.shape[1]
    return varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        scale=scale,
        window_size=window_size,
    )
