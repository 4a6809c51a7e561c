"""Both doors of the head against torch's cross-entropy on the full logits."""

import pytest
import torch
import torch.nn.functional as F

from lit_longctx.model import head


@pytest.fixture
def problem():
    hidden = torch.randn(700, 24, requires_grad=True)
    weight = torch.randn(50, 24, requires_grad=True)
    labels = torch.randint(0, 50, (700,))
    labels[torch.rand(700) < 0.3] = -100
    return hidden, weight, labels, torch.rand(700)


def reference(hidden, weight, labels):
    return F.cross_entropy(hidden @ weight.T, labels, reduction="none", ignore_index=-100)


@pytest.mark.parametrize("rows", [1, 7, 256, 10_000])
def test_both_entry_points(problem, rows, monkeypatch):
    monkeypatch.setattr(head, "rows_at_once", lambda weight: rows)
    hidden, weight, labels, weights = problem
    expected = reference(hidden, weight, labels)
    grads = torch.autograd.grad((expected * weights).sum(), (hidden, weight))

    nats = head.token_nats(hidden, weight, labels)
    torch.testing.assert_close(nats, expected, atol=1e-5, rtol=1e-6)
    found = torch.autograd.grad((nats * weights).sum(), (hidden, weight))
    for a, b in zip(found, grads, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)

    loss, nats = head.weighted_loss(hidden, weight, labels, weights)
    torch.testing.assert_close(loss, (expected * weights).sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(nats, expected, atol=1e-5, rtol=1e-6)
    assert not nats.requires_grad
    found = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(found, grads, strict=True):
        torch.testing.assert_close(a, 3 * b, atol=6e-5, rtol=1e-5)


def test_without_targets_the_loss_is_zero_with_zero_gradients(problem):
    hidden, weight, _, weights = problem
    labels = torch.full((700,), -100)
    for value in (
        head.token_nats(hidden, weight, labels).sum(),
        head.weighted_loss(hidden, weight, labels, weights)[0],
    ):
        assert value == 0
        grads = torch.autograd.grad(value, (hidden, weight))
        assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("rows", [7, 10_000])
def test_hits_are_the_targets_of_largest_logit(problem, rows, monkeypatch):
    monkeypatch.setattr(head, "rows_at_once", lambda weight: rows)
    hidden, weight, labels, _ = problem
    labels[:20] = (hidden[:20] @ weight.T).argmax(-1)
    nats, top1_correct = head.token_top1_correct(hidden, weight, labels)
    torch.testing.assert_close(nats, reference(hidden, weight, labels), atol=1e-5, rtol=1e-6)
    assert top1_correct.tolist() == [
        int((row @ weight.T).argmax()) == int(label)
        for row, label in zip(hidden, labels, strict=True)
    ]
    assert 20 <= int(top1_correct.sum()) < int((labels >= 0).sum())
    assert not nats.requires_grad


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1000.0, 0.0]])
    weight = torch.eye(2)
    loss, nats = head.weighted_loss(hidden, weight, torch.tensor([1]), torch.ones(1))
    assert loss == nats[0] == 1000


def test_bfloat16_keeps_float32_nats(problem):
    hidden, weight, labels, weights = problem
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    expected = reference(hidden, weight, labels).float()
    _, nats = head.weighted_loss(hidden, weight, labels, weights)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, expected, atol=0.2, rtol=0.02)


def test_no_gradients_are_computed_where_none_are_wanted(problem, monkeypatch):
    hidden, weight, labels, weights = problem
    with torch.no_grad():
        loss, _ = head.weighted_loss(hidden, weight, labels, weights)
    assert loss.grad_fn is None
