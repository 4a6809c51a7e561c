"""Who counts how much: loss weights of answers, inputs and whole conversations."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_longctx.batch import NO_TARGET, Batch

Mean = Literal["token", "sequence", "longalign"]
"""What counts alike: every target, every row, or every conversation."""


def weigh(
    batch: Batch,
    answers: Bool[Tensor, "batch seq"],
    input_loss: float = 0.0,
    mean: Mean = "token",
) -> Batch:
    """Set the weights w of a batch of conversations; training takes Σ w·nats / Σ w over a step.

    Targets of answers weigh 1, those of inputs `input_loss`. Two conversations in a row:

        input_ids        B    Hi   !    Hello E    B    2+2  ?    4    Sure ?    Yes
        labels           Hi   !    Hello E    ·    2+2  ?    4    Sure ?    Yes  E
        answers          0    0    1    1     0    0    0    1    0    0    1    1

        input_loss 0     0    0    1    1     0    0    0    1    0    0    1    1
        input_loss 0.5   1/2  1/2  1    1     0    1/2  1/2  1    1/2  1/2  1    1
        input_loss 1     1    1    1    1     0    1    1    1    1    1    1    1

        sequence, 0      0    0    1/5  1/5   0    0    0    1/5  0    0    1/5  1/5
        longalign, 0     0    0    1/2  1/2   0    0    0    1/3  0    0    1/3  1/3

    Args:
        batch: Every document is one conversation; one that packing cut counts once per piece.
        answers: Targets that belong to an answer. They are marks of `labels`: for marks of the
            tokens of a window, those from the second on.
        input_loss: Between 0, answers only, and 1, the whole sequence as Llama 2 Long has it for
            long inputs (Xiong et al. 2023, arXiv:2309.16039).
        mean: `token` leaves the weights as they are. `sequence` divides them by their sum in the
            row: the mean of means of packs, in which a target counts less the more share its row.
            `longalign` divides them by their sum in the conversation, for the mean over M of them,
            (1/M) Σ_i L_i/N_i (Bai et al. 2024, arXiv:2401.18058), however they are packed.

    A conversation without weight adds nothing to either sum, so M does not count it.

    Raises:
        ValueError: `input_loss` is out of range.
    """
    if not 0 <= input_loss <= 1:
        raise ValueError(
            f"expected an input_loss between 0 and 1; got {input_loss}; 0 trains on answers only"
        )
    weights = torch.where(answers, 1.0, input_loss) * (batch.labels != NO_TARGET)
    if mean != "token":
        weights = _shares(weights, _rows(batch) if mean == "sequence" else _conversations(batch))
    return batch._replace(loss_weights=weights)


def _rows(batch: Batch) -> Int[Tensor, "batch seq"]:
    rows = torch.arange(len(batch.labels), device=batch.labels.device)
    return rows.unsqueeze(1).expand_as(batch.labels)


def _conversations(batch: Batch) -> Int[Tensor, "batch seq"]:
    """Number of each token's conversation in the batch."""
    lengths = batch.documents.boundaries.diff()
    numbers = torch.arange(len(lengths), device=lengths.device)
    return numbers.repeat_interleave(lengths, output_size=batch.labels.numel()).view_as(
        batch.labels
    )


def _shares(
    weights: Float[Tensor, "batch seq"], groups: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """Divide weights by the sum of their group; where that is 0 they stay 0."""
    sums = weights.new_zeros(weights.numel(), dtype=torch.float64)  # there are no more groups
    sums.index_add_(0, groups.flatten(), weights.flatten().double())
    return (weights / sums.clamp(min=torch.finfo(torch.float64).tiny)[groups]).float()
