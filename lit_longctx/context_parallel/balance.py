"""How a row's chunks are divided, so that every process has as much attention to do."""

from collections.abc import Sequence
from math import inf

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_longctx.batch import Documents

BALANCED = 1.1
"""Work of the busiest process, over the mean, that needs no finer chunks."""
FINEST = 8
"""Most chunks that a process has of each row; every one has its own copy of the keys it sees."""


def chunks_of(documents: Documents, processes: int) -> Int[Tensor, "processes chunks size"]:
    """Return columns by process and chunk: the coarsest balanced layout, or the best of all."""
    seq, device = documents.ids.shape[1], documents.ids.device
    work = _work(documents)
    best, chunks = inf, torch.empty(0)
    each = 2
    while each <= FINEST and seq % (each * processes) == 0:
        columns = torch.arange(seq, device=device).view(each * processes, -1)
        numbers, busiest = balanced(work[columns].sum(1).tolist(), processes)
        if busiest < best:
            best, chunks = busiest, columns[torch.tensor(numbers, device=device)]
        if best <= BALANCED:
            break
        each *= 2
    return chunks


def imbalance(documents: Documents, chunks: Int[Tensor, "processes chunks size"]) -> float:
    """Return the attention work of the busiest process over the mean; 1 is perfect."""
    work = _work(documents)[chunks].sum((1, 2))
    return float(work.max() / work.mean())


def balanced(work: Sequence[float], processes: int) -> tuple[list[list[int]], float]:
    """Return as many chunks for each process, and the work of the busiest over the mean.

    The chunk of most work that is left goes to the process that has least and may have more: of one
    document's 2n chunks, numbers r and 2n − 1 − r to the same.
    """
    loads, numbers = [0.0] * processes, [[] for _ in range(processes)]
    for chunk in sorted(range(len(work)), key=lambda i: -work[i]):
        free = [p for p in range(processes) if len(numbers[p]) < len(work) // processes]
        least = min(free, key=lambda p: loads[p])
        numbers[least].append(chunk)
        loads[least] += work[chunk]
    return [sorted(each) for each in numbers], max(loads) * processes / sum(loads)


def _work(documents: Documents) -> Float[Tensor, " seq"]:
    """Return how many keys the queries of each column see, without windows, in all rows."""
    boundaries = documents.boundaries.long()
    sizes = boundaries.diff()
    begins = boundaries[:-1].repeat_interleave(sizes, output_size=documents.ids.numel())
    seen = torch.arange(1, begins.numel() + 1, device=begins.device) - begins
    return seen.view(documents.ids.shape).sum(0).double()
