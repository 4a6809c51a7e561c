"""`lit_longctx fit | validate | test`: LightningCLI with this project's defaults and checks."""

import json
import logging
import os
import resource
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.tensorboard.summary import hparams

import lit_longctx.data.finetuning
import lit_longctx.data.pretraining  # noqa: F401 - makes the classes known by their short names
from lit_longctx.stop_signals import Preempted
from lit_longctx.training.callbacks import KeepTokenizer, ProgressLine
from lit_longctx.training.checkpoints import Checkpoints, checkpoints_of
from lit_longctx.training.module import LanguageModule
from lit_longctx.training.parallel import FSDP2Strategy  # noqa: F401 - likewise
from lit_longctx.training.planned_run import PlanSettings, UnknownShape, check_fits, read_run
from lit_longctx.training.probes import Probes  # noqa: F401 - likewise
from lit_longctx.training.watchdog import Watchdog, explain

TRAINER = {
    "strategy": {"class_path": "lit_longctx.training.parallel.FSDP2Strategy"},
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "inference_mode": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "max_epochs": -1,
    "log_every_n_steps": 1,
    "check_val_every_n_epoch": None,
}


class SaveSettings(SaveConfigCallback):
    """Writes the run's config.yaml, and its settings where loggers keep hyperparameters."""

    def save_config(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Log the settings by their dotted names."""
        settings = self.parser.dump(self.config, format="json", skip_none=False)
        for logger in trainer.loggers:
            logger.log_hyperparams(json.loads(settings))


class RunLog(TensorBoardLogger):
    """TensorBoard in the run folder; its HPARAMS tab shows settings beside the last losses."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, name="", version="", default_hp_metric=False)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Write hparams.yaml, anew after a resume, and what the tab needs."""
        Path(self.log_dir, self.NAME_HPARAMS_FILE).unlink(missing_ok=True)
        super().log_hyperparams(params)
        shown = dict.fromkeys(("train/loss", "val/loss"), 0.0)
        for summary in hparams(flat(params), shown):
            self.experiment._get_file_writer().add_summary(summary)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names; what TensorBoard cannot hold is text."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, bool | int | float) else str(value)
    return found


class CLI(LightningCLI):
    """Models and data are chosen by class_path; the run folder is trainer.default_root_dir."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only the verbs that make sense here."""
        hidden = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        return dict.fromkeys(("fit", "validate", "test"), hidden)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Callbacks of every run, configurable under their own names."""
        parser.add_lightning_class_args(ProgressLine, "progress")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_argument("--plan", type=PlanSettings, default=PlanSettings())
        parser.add_argument(
            "--force", action="store_true", help="go on where memory is not enough by count"
        )

    def _parse_ckpt_path(self) -> None:
        """Our checkpoints hold no hyperparameters that could override the config."""

    def before_instantiate_classes(self) -> None:
        """Complete the config from the launcher; guard the run folder."""
        assert self.subcommand is not None
        options = self.config[self.subcommand]
        fill_in_launcher(options.trainer)
        raise_file_limit()
        if self.subcommand == "fit" and not options.force and rank_zero_only.rank == 0:
            refuse_what_does_not_fit(options)
        run = Path(options.trainer.default_root_dir or "runs/default")
        options.trainer.default_root_dir = str(run)
        options.ckpt_path = find_checkpoint(run, options.ckpt_path, resume=self.subcommand == "fit")

    def after_fit(self) -> None:
        """Validate the last step if a stop cut that short: Lightning has found nothing to do."""
        validate = partial(
            self.trainer.validate, self.model, datamodule=self.datamodule, verbose=False
        )
        for saving in checkpoints_of(self.trainer):
            saving.finish_preempted(self.trainer, validate)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to TensorBoard in the run folder unless told otherwise."""
        assert self.subcommand is not None
        options = self.config_init[self.subcommand].trainer
        if options.get("logger") in (None, True):
            kwargs["logger"] = RunLog(options.default_root_dir)
        by_slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
        if by_slurm and options.get("plugins") is None:
            # Lightning's own requeueing saves inside of a signal handler
            kwargs["plugins"] = [SLURMEnvironment(auto_requeue=False)]
        return super().instantiate_trainer(**kwargs)


def raise_file_limit() -> None:
    """Allow as many open files as the system does: loader workers pass each tensor by a file."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def refuse_what_does_not_fit(options: Any) -> None:
    """Raise DoesNotFit before anything is loaded, if a step needs more memory than there is."""
    try:
        run = read_run(options, PlanSettings(hardware="cpu" if on_cpu(options.trainer) else None))
    except UnknownShape:  # what is wrong, the model says better
        return
    if not run.is_small:
        check_fits(run, "--force goes on")


def on_cpu(trainer: Any) -> bool:
    """Whether a trainer's processes compute on the host."""
    return trainer.accelerator == "cpu" or not torch.cuda.is_available()


def fill_in_launcher(trainer: Any) -> None:
    """Take devices and nodes from torchrun, or else from Slurm, where they are left open."""
    if trainer.devices != "auto":
        return
    if local := os.environ.get("LOCAL_WORLD_SIZE"):
        trainer.devices = int(local)
        trainer.num_nodes = int(os.environ["WORLD_SIZE"]) // int(local)
    elif SLURMEnvironment.detect():
        trainer.num_nodes = int(os.environ.get("SLURM_NNODES", 1))
        trainer.devices = int(os.environ["SLURM_NTASKS"]) // trainer.num_nodes


def find_checkpoint(run: Path, asked: str | None, resume: bool) -> str | None:
    """Resolve `last` to the run's checkpoints; refuse to begin a run in a folder that has some.

    Which of them is the newest whole one, all processes find out together when they load it.
    """
    folder = run / "checkpoints"
    found = folder.is_dir() and any(folder.glob("step-????????"))
    if asked == "last" and found:
        return str(folder)
    if asked == "last" and resume:
        rank_zero_only(print)(f"{folder} holds no checkpoint yet: starting anew")
        return None
    if asked is None and found and resume:
        raise ValueError(
            f"{run} holds a run already; continue it with --ckpt_path last, "
            "or choose another --trainer.default_root_dir"
        )
    if asked is not None and not Path(asked).is_dir():
        raise ValueError(
            f"checkpoint {asked} does not exist; expected a folder like {folder}/step-00000100"
        )
    return asked


def fit(arguments: list[str]) -> int:
    """Run LightningCLI with these arguments; return the exit code, 75 if a signal stopped it."""
    quiet()
    watchdog = Watchdog()
    try:
        run_cli(arguments, watchdog)
    except Preempted as end:
        return end.code
    except SIGTERMException as end:  # an exit without a code: a test would pass for finished
        raise InterruptedError("stopped by SIGTERM") from end
    except SystemExit as end:
        if end.code:  # Lightning's answer to Ctrl-C, given without a word
            raise KeyboardInterrupt from end
        raise
    except Exception as error:
        if watchdog.another_failed:  # and says why
            return 1
        raise explain(error) from error
    return 0


def quiet() -> None:
    """Let Lightning say warnings alone."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)


def run_cli(arguments: list[str], watchdog: Watchdog, command: type[CLI] | None = None) -> None:
    """Parse the arguments, build everything and run the verb."""
    (command or CLI)(
        LanguageModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveSettings,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={**TRAINER, "callbacks": [KeepTokenizer(), watchdog]},
        parser_kwargs={"exit_on_error": False},
        seed_everything_default=0,
        auto_configure_optimizers=False,  # options that would put aside the module's own
        args=arguments,
    )
