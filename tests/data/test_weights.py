from fractions import Fraction
from inspect import getdoc

import pytest
import torch
import torch.nn.functional as F
from differences import assert_near

from lit_longctx.batch import NO_TARGET, pack
from lit_longctx.data.sampling.weights import weigh
from lit_longctx.model import Llama, LlamaConfig
from lit_longctx.position import RoPE

B, E, VOCAB, SEQ = 1, 2, 40, 24
MEANS = ["token", "sequence", "longalign"]


def drawn():
    """The lines of the docstring's example: name → entries."""
    found = {}
    for line in (getdoc(weigh) or "").splitlines():
        if line.startswith(" " * 4):
            found[line[4:21].strip()] = line[21:].split()
    return found


@pytest.mark.parametrize(
    ("name", "input_loss", "mean"),
    [
        ("input_loss 0", 0.0, "token"),
        ("input_loss 0.5", 0.5, "token"),
        ("input_loss 1", 1.0, "token"),
        ("sequence, 0", 0.0, "sequence"),
        ("longalign, 0", 0.0, "longalign"),
    ],
)
def test_the_example_drawn_in_the_docstring(name, input_loss, mean):
    example = drawn()
    words = ["", "B", *sorted({*example["input_ids"], "E"} - {"B"})]
    window = [words.index(word) for word in [*example["input_ids"], "E"]]
    batch = pack(torch.tensor([window]), bos=B)
    labels = [words[label] if label >= 0 else "·" for label in batch.labels[0].tolist()]
    assert labels == example["labels"]
    answers = torch.tensor([[mark == "1" for mark in example["answers"]]])
    expected = torch.tensor([[float(Fraction(weight)) for weight in example[name]]])
    torch.testing.assert_close(weigh(batch, answers, input_loss, mean).loss_weights, expected)


def conversations(generator, number):
    """Tokens of conversations with marks of their answers; ragged, one of them without any."""
    found = []
    for i in range(number):
        length = int(torch.randint(4, 11, (1,), generator=generator))
        tokens = [B, *torch.randint(3, VOCAB, (length - 2,), generator=generator).tolist(), E]
        begin = int(torch.randint(1, length - 1, (1,), generator=generator))
        marks = [at >= begin and i != 2 for at in range(length)]
        found.append((tokens, marks))
    return found


def packed(found):
    """Two conversations and padding per row: windows, and marks of their tokens."""
    windows = torch.full((len(found) // 2, SEQ + 1), NO_TARGET)
    marks = torch.zeros(windows.shape, dtype=torch.bool)
    for row in range(len(windows)):
        tokens = found[2 * row][0] + found[2 * row + 1][0]
        windows[row, : len(tokens)] = torch.tensor(tokens)
        marks[row, : len(tokens)] = torch.tensor(found[2 * row][1] + found[2 * row + 1][1])
    return windows, marks


def rows(windows, marks, input_loss, mean):
    return weigh(pack(windows, bos=B), marks[:, 1:], input_loss, mean)


def tiny():
    config = LlamaConfig(VOCAB, 32, 48, 2, 4)
    return Llama(config, RoPE(theta=100.0))


def joint(llama, batches):
    """Loss and gradients as training sums them: Σ over micro-batches of Σ w·nats / W."""
    total = sum(batch.loss_weights.sum(dtype=torch.float64) for batch in batches)
    llama.zero_grad()
    loss = 0.0
    for batch in batches:
        part = llama.loss(batch)[0] / total
        part.backward()
        loss += part.detach()
    return loss.float(), [p.grad.clone() for p in llama.parameters()]


def test_longalign_is_the_mean_over_unpacked_conversations_of_their_mean_loss():
    found = conversations(torch.Generator().manual_seed(0), 16)
    llama = tiny()
    loss, gradients = joint(llama, [rows(*packed(found), 0.0, "longalign")])
    llama.zero_grad()
    means = []
    for tokens, marks in found:
        logits = llama.logits(pack(torch.tensor([tokens]), bos=B))[0]
        nats = F.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="none")
        answered = nats[torch.tensor(marks[1:])]
        means += [answered.mean()] if len(answered) else []
    assert len(means) == 15  # that without an answer is not counted
    expected = torch.stack(means).mean()
    expected.backward()
    assert_near("LongAlign's loss and gradients, packed", loss, expected.detach(), atol=1e-6)
    for gradient, parameter in zip(gradients, llama.parameters(), strict=True):
        assert_near("LongAlign's loss and gradients, packed", gradient, parameter.grad, atol=1e-6)


@pytest.mark.parametrize("input_loss", [0.0, 0.3])
def test_sequence_is_the_mean_over_rows_of_their_weighted_means(input_loss):
    windows, marks = packed(conversations(torch.Generator().manual_seed(1), 16))
    llama = tiny()
    loss, _ = joint(llama, [rows(windows, marks, input_loss, "sequence")])
    means = []
    for window, mark in zip(windows, marks, strict=True):
        batch = pack(window[None], bos=B)
        labels = batch.labels[0]
        nats = F.cross_entropy(llama.logits(batch)[0], labels, reduction="none")
        chosen = [(nats[t], 1.0 if mark[t + 1] else input_loss) for t in range(SEQ)]
        chosen = [c for c, label in zip(chosen, labels, strict=True) if label != NO_TARGET]
        means.append(sum(n * w for n, w in chosen) / sum(w for _, w in chosen))
    torch.testing.assert_close(loss, torch.stack(means).mean().detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_have_the_gradient_of_the_joint_batch(mean, size):
    windows, marks = packed(conversations(torch.Generator().manual_seed(2), 16))
    llama = tiny()
    loss, gradients = joint(llama, [rows(windows, marks, 0.25, mean)])
    pieces = zip(windows.split(size), marks.split(size), strict=True)
    batches = [rows(window, mark, 0.25, mean) for window, mark in pieces]
    assert len(batches) == 8 // size
    again, parts = joint(llama, batches)
    torch.testing.assert_close(again, loss, atol=1e-6, rtol=0)
    for part, gradient in zip(parts, gradients, strict=True):
        torch.testing.assert_close(part, gradient, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("padding", [False, True])
def test_a_micro_batch_without_weight_adds_exactly_nothing(mean, padding):
    windows, marks = packed(conversations(torch.Generator().manual_seed(3), 8))
    llama = tiny()
    alone = joint(llama, [rows(windows, marks, 0.0, mean)])
    masked = torch.full_like(windows, NO_TARGET) if padding else windows
    empty = rows(masked, torch.full_like(marks, padding), 0.0, mean)
    assert empty.loss_weights.count_nonzero() == 0
    loss, gradients = joint(llama, [empty, rows(windows, marks, 0.0, mean)])
    assert torch.equal(loss, alone[0])
    for gradient, expected in zip(gradients, alone[1], strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("input_loss", [0.0, 0.1, 1.0])
def test_under_longalign_the_weights_of_each_conversation_sum_to_one_or_nothing(input_loss):
    windows, marks = packed(conversations(torch.Generator().manual_seed(4), 16))
    batch = rows(windows, marks, input_loss, "longalign")
    sums: dict[tuple[int, int], float] = {}
    empty = set()
    for row, ids in enumerate(batch.documents.ids.tolist()):
        for t, document in enumerate(ids):
            key = row, document
            sums[key] = sums.get(key, 0.0) + float(batch.loss_weights[row, t])
            if document == 2 or (key == (1, 0) and not input_loss):  # padding; without an answer
                empty.add(key)
    assert len(empty) == 8 + (not input_loss)
    for key, found in sums.items():
        assert found == pytest.approx(0.0 if key in empty else 1.0, abs=1e-6)


@pytest.mark.parametrize("input_loss", [-0.1, 1.5, float("nan")])
def test_an_input_loss_out_of_range_is_refused(input_loss):
    windows, marks = packed(conversations(torch.Generator().manual_seed(5), 2))
    with pytest.raises(ValueError, match=r"expected an input_loss between 0 and 1; got"):
        rows(windows, marks, input_loss, "token")
