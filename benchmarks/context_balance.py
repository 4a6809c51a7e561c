"""Attention work of the busiest process under context parallelism, over the mean.

    python benchmarks/context_balance.py

Rows of 131,072 tokens; 20 of each kind. Two fixed chunks a process, as for one document, beside
what zigzag chooses by the documents.
"""

from collections.abc import Callable

import torch

from lit_longctx.batch import Documents, documents_from_starts
from lit_longctx.context_parallel.balance import chunks_of, imbalance

TOKENS = 131_072
LENGTHS: dict[str, Callable[[], torch.Tensor]] = {
    "one document": lambda: torch.tensor([TOKENS]),
    "1,000 tokens each": lambda: torch.full((TOKENS // 1000 + 1,), 1000),
    "half a row, then 1,000 each": lambda: torch.tensor([TOKENS // 2] + [1000] * 70),
    "lognormal, median 1,000, σ 1.5": lambda: torch.exp(6.9 + 1.5 * torch.randn(5000)),
    "lognormal, median 8,000, σ 1": lambda: torch.exp(9 + torch.randn(500)),
}


def row(lengths: torch.Tensor) -> Documents:
    starts = torch.zeros(1, TOKENS, dtype=torch.bool)
    begins = torch.nn.functional.pad(lengths.clamp(min=16).long().cumsum(0), (1, 0))
    starts[0, begins[begins < TOKENS]] = True
    return documents_from_starts(starts)


def fixed(processes: int) -> torch.Tensor:
    columns = torch.arange(TOKENS).view(2 * processes, -1)
    return torch.stack([columns[:processes], columns[processes:].flip(0)], dim=1)


if __name__ == "__main__":
    torch.manual_seed(0)
    print("| documents | processes | two fixed chunks: worst | chosen: mean | worst |")
    print("|---|---|---|---|---|")
    for name, lengths in LENGTHS.items():
        for processes in (2, 4, 8, 16):
            rows = [row(lengths()) for _ in range(20)]
            plain = max(imbalance(each, fixed(processes)) for each in rows)
            found = [imbalance(each, chunks_of(each, processes)) for each in rows]
            mean = sum(found) / len(found)
            print(f"| {name} | {processes} | {plain:.2f} | {mean:.2f} | {max(found):.2f} |")
