"""Probes during training: does the model find what was hidden, and how far is it from that."""

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lit_longctx.data.sampling.data_description import describe_data
from lit_longctx.data.sampling.steps import StepData, data_rank
from lit_longctx.data.store.windows import Windows
from lit_longctx.data.tokens.opening import open_tokenizer
from lit_longctx.evaluation.evaluate import haystack
from lit_longctx.evaluation.retrieval.grid import Grid, Probe
from lit_longctx.evaluation.retrieval.prompts import Haystack
from lit_longctx.evaluation.retrieval.scoring import teacher_forced
from lit_longctx.model import Llama
from lit_longctx.training.checkpoints import checkpoints_of
from lit_longctx.training.module import LanguageModule


class Probes(Callback):
    """Reads right answers with every validation: `probe/TASK/TOKENS`, and heat maps, in the log.

    `probe/TASK/TOKENS` is the share of prompts of that many tokens whose answer is the likeliest,
    `probe/TASK_nats/TOKENS` the loss of a token of the answer, which falls long before. Needles
    are hidden in held-out text of the first source, or in a built-in one (chats, MDS). Costs a
    forward pass for each prompt; the processes share them.

    Args:
        tasks: Names of the probes, as for `evaluate`.
        grid: Lengths, depths and samples.
    """

    def __init__(
        self,
        tasks: list[str] = ["needle"],  # noqa: B006 - never changed
        grid: Grid = Grid(),
    ) -> None:
        if grid.answers != "teacher_forced":
            raise ValueError(
                "grid.answers generated would stop the run for long; set it to teacher_forced"
            )
        self.tasks = tasks
        self.grid = grid
        self.probes: dict[str, Probe] = {}

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Refuse now what could not be asked later."""
        hay = self._haystack(trainer)
        self.probes = {name: Probe(name, self.grid, hay) for name in self.tasks}
        self.items = {name: probe.eval_items() for name, probe in self.probes.items()}

    def _haystack(self, trainer: Trainer) -> Haystack:
        data = getattr(trainer, "datamodule", None)
        folder = describe_data(data).tokenizer_folder
        if folder is None or not isinstance(data, StepData):
            raise ValueError("Probes need a tokenizer; the data has none; leave them out")
        source = next(iter(data.held_out(data.longest).values()))
        if isinstance(source, Windows):
            return haystack(source, max(self.grid.lengths))
        return Haystack(open_tokenizer(str(folder)))  # shards and chats have no running text

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Ask, log and draw."""
        for name, probe in self.probes.items():
            found = self._answers(probe, name, module)
            scores, nats = (probe.cells(column) for column in found.T)
            for length, score, loss in zip(
                self.grid.lengths, scores.mean(1), nats.mean(1), strict=True
            ):
                module.log(f"probe/{name}/{length}", float(score))
                module.log(f"probe/{name}_nats/{length}", float(loss))
            if trainer.is_global_zero:
                self._show(module, probe, scores)

    def _answers(self, probe: Probe, name: str, module: LightningModule) -> np.ndarray:
        """Return hit and mean nats of each item; every process runs the model as often."""
        items = self.items[name]
        found = torch.zeros(len(items), 2, dtype=torch.float64, device=module.device)
        llama = module.llama
        assert isinstance(llama, Llama)
        rank, ranks = data_rank(module.trainer)
        for first in range(0, len(items), ranks):
            for each in checkpoints_of(module.trainer):
                each.stop_validation_if_asked(module.trainer)
            number = first + rank
            answer = teacher_forced(llama, [probe.sample(items[min(number, len(items) - 1)])])[0]
            if number < len(items):
                found[number] = torch.tensor([float(answer.exact), float(answer.nats.mean())])
        if dist.is_initialized():
            dist.all_reduce(found)
            found /= dist.get_world_size() // ranks  # which of them found the same
        return found.cpu().numpy()

    def _show(self, module: LightningModule, probe: Probe, scores: np.ndarray) -> None:
        assert isinstance(module, LanguageModule)
        name, step = probe.name, module.trained_steps
        means = zip(self.grid.lengths, scores.mean(1), strict=True)
        each = ", ".join(f"{mean:.2f} at {length:,}" for length, mean in means)
        print(f"step {step}  {name} {each}", flush=True)
        figure = probe.draw({name: scores.tolist()})
        for logger in module.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure(f"probe/{name}", figure, step)
