"""What a stage of a run takes before it is run: memory by kind, FLOPs and time.

Activations are counted (`memory_count`); what FSDP2 and the optimizer hold follows by formula. The
contract: never less than is used, and within a tenth of it
(`tests/training/test_estimate.py` measures that on a CPU).
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from lit_longctx.batch import documents_from_starts, one_document
from lit_longctx.context_parallel.balance import chunks_of, imbalance
from lit_longctx.model import LlamaConfig
from lit_longctx.model.layers import Layers
from lit_longctx.training.flops import matrix_weights
from lit_longctx.training.hardware import Hardware
from lit_longctx.training.memory_count import Levers, count_row, parameter_counts

COUNTED_AT = (2**17, 2**18)
"""Tokens of a process up to which rows are counted; longer ones lie on the line through both."""
MOMENT_BYTES = {"adamw": 8, "adamw_bf16_moments": 4, "adamw8bit": 2 + 8 / 256}
"""Of both moments for a parameter; in 8 bits a float32 scale for 256 values of each."""


class DoesNotFit(ValueError):
    """A run needs more memory than a device has."""

    exit_code = 3


@dataclass(frozen=True)
class Workload:
    """What every process does in a stage of a run, and on what."""

    config: LlamaConfig
    levers: Levers
    window: int
    """Tokens per row."""
    batch_tokens: int
    """Tokens per optimizer step, over all processes."""
    rows: int
    """Rows of a micro-batch."""
    processes: int
    """Devices in all."""
    replicas: int = 1
    """Copies of the sharded states."""
    cpu_dtype: torch.dtype | None = None
    """Dtype of products on a CPU; None: CUDA, bfloat16."""

    @property
    def shards(self) -> int:
        """Processes that the states are divided among."""
        return self.processes // self.replicas

    @property
    def micro_batches(self) -> int:
        """Of a process in a step."""
        groups = self.processes // self.levers.context_parallel_size
        return -(-self.batch_tokens // (self.window * self.rows * groups))


@dataclass(frozen=True)
class MemoryByKind:
    """Bytes of one process at the widest point of a step."""

    weights: float
    """Float32 master weights: this process's shards."""
    moments: float
    """The optimizer's, this process's shards."""
    gradients: float
    """Float32 shards, as many as there are at that point."""
    gathered: float
    """Blocks that FSDP2 has gathered, and gradients that it is reducing."""
    block_inputs: float
    """What blocks keep for backward."""
    widest: float
    """What the block, or the head, that is at work needs beside."""
    gathered_keys: float
    """Keys and values of other processes: part of `widest`."""
    reserved: float
    host: float
    """In host memory: offloaded block inputs and states."""

    @property
    def device(self) -> float:
        """All that is on the device."""
        states = self.weights + self.gradients + self.moments
        return states + self.gathered + self.block_inputs + self.widest + self.reserved


def memory_by_kind(work: Workload, reserved: float = 0.0) -> MemoryByKind:
    """Return a step's memory at its widest point; counting takes a second or two.

    That point is the head, the first block that runs backward, the last one, or the optimizer's
    update. In a step of one micro-batch, gradients appear as block inputs go; in one of several
    all gradients are there from the second on.
    """
    levers, layers, shards = work.levers, work.config.num_hidden_layers, work.shards
    block, root = parameter_counts(work.config)
    parameters = layers * block + root
    weights = gradients = 4 * parameters / shards
    moments = MOMENT_BYTES[levers.optimizer] * parameters / shards
    size = 4 if work.cpu_dtype == torch.float32 else 2
    # a CPU finishes one copy of gathered weights before the next begins
    buffers = 2 if work.cpu_dtype is not None else 3
    gathered = size * (root + buffers * block)
    gathered += 8 * block / shards if levers.cpu_offload else 0
    reduced = 4 * block
    update = 8 * max(block, root) / shards  # temporaries, of one parameter at a time
    if work.cpu_dtype is None and not levers.cpu_offload:
        update = gradients  # torch's foreach: of all at once
    beside, kept = activations(work)
    inputs, several = layers * kept.device, work.micro_batches > 1
    summed = gradients if several else 0.0
    points: list[tuple[float, float, float, float]] = [
        (summed, gathered, inputs, beside.forward),
        (summed, gathered + reduced, inputs, beside.backward),
        (
            gradients if several else 4 * (layers - 1) * block / shards,
            gathered + reduced,
            kept.device,
            beside.backward,
        ),
        (gradients, 0.0, 0.0, update),
    ]
    host = beside.host + layers * kept.host
    if levers.cpu_offload:
        host += weights + gradients + moments
        points = [(0.0, *point[1:]) for point in points]
        weights = moments = 0.0
    point = max(points, key=sum)
    return MemoryByKind(weights, moments, *point, _gathered_keys(work), reserved, host)


def _gathered_keys(work: Workload) -> float:
    """Bytes of a layer's keys and values of a whole row, where zigzag gathers them."""
    levers = work.levers
    if levers.context_parallel_size == 1 or levers.context_parallel != "zigzag":
        return 0.0
    heads = levers.kv_heads_at_once or work.config.kv_heads
    return 2 * 2 * work.rows * work.window * heads * work.config.head_width


class _Bytes(NamedTuple):
    """Of activations: beside block inputs, or of block inputs alone."""

    forward: float
    """At the widest point of forward."""
    backward: float
    """At the widest point of backward."""
    host: float

    @property
    def device(self) -> float:
        """Of block inputs, which are the same at both points."""
        return self.forward

    def towards(self, other: "_Bytes", share: float) -> "_Bytes":
        """Return a point of the line through both: this at 0, the other at 1."""
        return _Bytes(*(a + share * (b - a) for a, b in zip(self, other, strict=True)))


def activations(work: Workload) -> tuple[_Bytes, _Bytes]:
    """Return what is needed beside block inputs, and what every block keeps."""
    levers = replace(work.levers, optimizer="adamw", cpu_offload=False)
    size = levers.context_parallel_size
    tokens = work.rows * work.window // size
    key = (replace(work.config, num_hidden_layers=1), levers, work.cpu_dtype)
    if tokens <= COUNTED_AT[1]:
        return _counted(*key, work.window, work.rows)
    first, last = (_counted(*key, n * size, 1) for n in COUNTED_AT)
    share = (tokens - COUNTED_AT[0]) / (COUNTED_AT[1] - COUNTED_AT[0])
    beside, kept = (a.towards(b, share) for a, b in zip(first, last, strict=True))
    return beside, kept


@lru_cache(maxsize=256)
def _counted(
    config: LlamaConfig, levers: Levers, cpu_dtype: torch.dtype | None, window: int, rows: int
) -> tuple[_Bytes, _Bytes]:
    two, three = (count_row(config, window, levers, n, rows, cpu_dtype) for n in (2, 3))
    device, host = three.kept - two.kept, three.host - two.host
    beside = _Bytes(two.forward - 2 * device, two.backward - 2 * device, two.host - 2 * host)
    return beside, _Bytes(device, device, host)


def bound(work: Workload) -> float:
    """Return bytes of a device that no step of this kind takes, without counting.

    All tensors of every block in float32 and in all processes, with all states on each.
    """
    config, tokens = work.config, work.rows * work.window
    block, root = parameter_counts(config)
    layers, inner = config.num_hidden_layers, config.intermediate_size
    heads = config.num_attention_heads * config.head_width
    token = 8 * config.hidden_size + 6 * heads + 6 * inner
    chunk = max(work.levers.head_chunk_tokens or 256, 2**27 // config.vocab_size)
    logits = 3 * min(tokens, chunk) * config.vocab_size
    return 4 * (8 * (layers * block + root) + (layers + 4) * tokens * token + logits)


# ---- longest window, fewest devices


def needed(work: Workload, hardware: Hardware) -> float:
    """Return the bytes of a step that are on a device; a CPU holds what is offloaded too."""
    memory = memory_by_kind(work, hardware.reserved)
    return memory.device + (memory.host if hardware.is_cpu else 0.0)


def fits(work: Workload, hardware: Hardware) -> bool:
    """Whether a device holds a step."""
    return needed(work, hardware) <= hardware.bytes


def longest_window(work: Workload, hardware: Hardware) -> int:
    """Return the tokens of the longest row that fits, one in a micro-batch; 0: not even 256 do."""
    unit = 256 * work.levers.context_parallel_size
    room = hardware.bytes

    def row(number: int) -> float:
        window = number * unit
        batch = max(window, work.batch_tokens)
        return needed(replace(work, window=window, batch_tokens=batch, rows=1), hardware)

    low, high = 0, 64
    while row(high) <= room:
        low, high = high, 2 * high
    if not low:
        return bisect_right(range(high), room, lo=1, key=row) * unit - unit
    while True:  # what is needed is convex in the window: a chord never promises too much
        at_low, at_high = row(low), row(high)
        further = int((room - at_low) / (at_high - at_low) * (high - low))
        if further <= low // 100:
            return (low + further) * unit
        low += further


def fewest_devices(work: Workload, hardware: Hardware) -> int | None:
    """Return how many devices fit, a power of two times the processes of a row; None: none do."""
    size = work.levers.context_parallel_size
    for n in range(14):
        if fits(replace(work, processes=size * 2**n, replicas=1), hardware):
            return size * 2**n
    return None


# ---- FLOPs


Lengths = Sequence[tuple[float, float]]
"""(tokens of a document, how many tokens are in documents of that length)"""


def seen_per_token(window: int, lengths: Lengths | None = None, local: int | None = None) -> float:
    """Return the mean number of keys that a query sees, itself among them.

    Documents are joined and the stream is cut every `window` tokens, wherever that is: two tokens
    that are d apart in a document stay together with probability 1 − d / window.

    Args:
        window: Tokens per row.
        lengths: Of the documents; None: rows of one document each.
        local: Attention window of the layer; None: none.
    """
    if lengths is None:
        reach = min(local or window, window)
        return reach - reach * (reach - 1) / 2 / window
    total = sum(tokens for _, tokens in lengths)
    seen = 0.0
    for length, tokens in lengths:
        reach = min(length, window, local or window)
        # Σ over d < reach of (length − d) · (1 − d / window)
        apart, squares = reach * (reach - 1) / 2, (reach - 1) * reach * (2 * reach - 1) / 6
        pairs = length * reach - (1 + length / window) * apart + squares / window
        seen += tokens * pairs / length
    return seen / total


def flops_per_token(work: Workload, layers: Layers, lengths: Lengths | None = None) -> float:
    """Return causal model FLOPs of forward and backward for a token, without what is recomputed."""
    config = work.config
    per_pair = 12 * config.num_attention_heads * config.head_width
    seen = sum(
        layers.kind_of.count(i) * seen_per_token(work.window, lengths, kind.window)
        for i, kind in enumerate(layers.kinds)
    )
    return 6 * matrix_weights(config) + per_pair * seen


def seconds_per_step(work: Workload, flops: float, peak: float, efficiency: float) -> float:
    """Return the time of a step.

    Args:
        work: What is computed.
        flops: Per token, as `flops_per_token` counts them.
        peak: Of a device, in FLOP/s.
        efficiency: Share of the peak that is reached.
    """
    return work.batch_tokens * flops / (peak * efficiency * work.processes)


def busiest_share(work: Workload, lengths: Lengths | None = None) -> float:
    """Return the attention of zigzag's busiest process over the mean, for rows like these.

    Args:
        work: What is computed.
        lengths: Of the documents, which are drawn by their tokens, with a fixed seed.
    """
    size = work.levers.context_parallel_size
    if size == 1 or work.levers.context_parallel == "ulysses":
        return 1.0
    window = work.window // (2 * size) * 2 * size
    documents = one_document(1, window)
    if lengths:
        starts = torch.zeros(1, window, dtype=torch.bool)
        sizes = torch.tensor([length for length, _ in lengths])
        odds = torch.tensor([tokens / length for length, tokens in lengths])
        drawn = torch.multinomial(odds, window, True, generator=torch.Generator().manual_seed(0))
        begins = sizes[drawn].round().long().clamp(min=1).cumsum(0)
        starts[0, 0] = True
        starts[0, begins[begins < window]] = True
        documents = documents_from_starts(starts)
    return imbalance(documents, chunks_of(documents, size))
