"""Gradient training through Hugging Face's Trainer: resume, mixed precision and schedules are its work."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import MissingCapabilityError, TrainingError
from models.tasks import task_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import Trainer

    from models.modalities import Processing
    from models.tasks import Task
    from stages.base import StageContext
    from stages.data.splits import Example
    from stages.finetune.config import Augment
    from stages.finetune.rates import Rates

BEST = "best.safetensors"
HISTORY = "history.json"
SCORES = "scores of the validation examples"
"""A tensor beside the best weights: no parameter has a space in its name."""
CROPPED = (0.6, 1.0)
"""Share of the area that a crop keeps. Narrower than the .08 that ImageNet is trained with: with few examples to learn
from, a part that no longer shows the thing is a wrong label."""
COMPLETE = "complete"
"""Written into a checkpoint of the Trainer when all its files are there: a killed run leaves half of one."""


@dataclass(frozen=True)
class TrainingPlan:
    """Plain arguments of one training."""

    epochs: int
    batch_size: int
    rates: Rates
    weight_decay: float
    warmup_fraction: float
    patience: int
    precision: str
    augment: Augment
    hold_batchnorm: bool
    workers: int
    seed: int
    processes: int = 1
    """That share each batch."""


class Diverged(Exception):
    """The loss is NaN or infinite. Not an error of the pipeline: finetune makes a failed gate of it."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step
        self.history: list[dict[str, float]] = []
        """The epochs before it."""


@dataclass(frozen=True)
class Trained:
    """What training gave: the network holds the weights of `best_epoch`, unless it `diverged` (why, in words).

    `scores`: float64 (validation examples,), how good its answers are; None where it diverged.
    """

    best_epoch: int
    history: list[dict[str, float]]
    scores: np.ndarray | None
    diverged: str | None = None


class ExampleDataset:
    """A map-style data set of (inputs of one example, label)."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


def make_collate(processing: Processing, task: Task, outputs: int) -> Any:
    """Examples → input tensors and `labels`, the task's targets."""
    import torch

    def collate(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        arrays = processing.arrays([example.content for example in examples])
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch["labels"] = torch.from_numpy(task.targets([example.label for example in examples], outputs))
        return batch

    return collate


def augmented(images: torch.Tensor, how: Augment) -> torch.Tensor:
    """Images of uint8 (batch, height, width, 3) as training sees them."""
    if how == "crop":
        images = crop_each(images)
    return images if how == "none" else flip_half(images)


def crop_each(images: torch.Tensor) -> torch.Tensor:
    """A part of each image of uint8 (batch, height, width, 3) at random, at the size of the whole (Szegedy et al. 2015,
    arXiv 1409.4842): `CROPPED` of its area, its sides 3:4 to 4:3."""
    import torch
    from torchvision.transforms.v2 import RandomResizedCrop

    crop = RandomResizedCrop(images.shape[1:3], scale=CROPPED)
    return torch.stack([crop(image) for image in images.permute(0, 3, 1, 2)]).permute(0, 2, 3, 1)


def flip_half(images: torch.Tensor) -> torch.Tensor:
    """Mirror each image of uint8 (batch, height, width, 3) with probability one half."""
    import torch

    chosen = torch.rand(len(images), device=images.device) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(2), images)


def train(
    model: torch.nn.Module,
    processing: Processing,
    examples: Sequence[Example],
    validation: Sequence[Example],
    plan: TrainingPlan,
    context: StageContext,
    folder: Path,
) -> Trained:
    """Train, evaluate after each epoch, and leave the network at its best epoch. Resumes from `folder` by itself.

    Raises:
        Diverged: the loss is not finite.
        TrainingError: memory ran out, or PyTorch refused a step.
    """
    return fit(model, processing, examples, validation, plan, context, folder).restore_best(model)


def fit(
    model: torch.nn.Module,
    processing: Processing,
    examples: Sequence[Example],
    validation: Sequence[Example],
    plan: TrainingPlan,
    context: StageContext,
    folder: Path,
) -> Recorder:
    """As `train`, but the best weights stay on disk. With `plan.processes` each of them calls this.

    One Trainer and one optimizer a call: an optimizer never learns of a parameter that is unfrozen later.

    Raises:
        Diverged: the loss is not finite.
        TrainingError: memory ran out, or PyTorch refused a step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(folder, plan)
    trainer = make_trainer(model, processing, examples, validation, plan, context, folder / "trainer", recorder)
    last = last_complete_checkpoint(folder / "trainer")
    if last:
        context.log.info("%-10s resumes at %s", "", last.name)
    if not (last and recorder.should_stop()):
        done = int(last.name.rpartition("-")[2]) if last else 0
        steps = steps_per_epoch(len(examples), plan.batch_size) * plan.epochs - done
        with context.progress.task("training", steps) as advance, translated_errors(plan):
            recorder.advance = advance
            if plan.processes > 1:
                from accelerate.utils import set_seed

                set_seed(plan.seed, device_specific=True)  # or each would flip and drop out the same as the others
            try:
                trainer.train(resume_from_checkpoint=str(last) if last else None)
            except Diverged as error:
                error.history = recorder.history
                raise
    return recorder


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of the Trainer that was written to its end; halves are removed."""
    complete = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / COMPLETE).is_file():
            complete.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(complete, key=lambda one: int(one.name.rpartition("-")[2]), default=None)


def drop_last(examples: int, batch_size: int) -> bool:
    """Whether the last batch would hold a single example, on which batch norm cannot train."""
    return examples > batch_size and examples % batch_size == 1


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Optimizer steps in one pass."""
    return examples // batch_size if drop_last(examples, batch_size) else math.ceil(examples / batch_size)


@contextmanager
def translated_errors(plan: TrainingPlan) -> Iterator[None]:
    """What PyTorch and safetensors raise during training, as errors of this project.

    Raises:
        TrainingError: memory ran out, or a step was refused.
    """
    import torch
    from safetensors import SafetensorError

    try:
        yield
    except (RuntimeError, ValueError, SafetensorError) as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text:
            smaller = max(1, plan.batch_size // 2)
            raise TrainingError(
                f"out of memory at batch size {plan.batch_size}; try --set finetune.batch_size={smaller}"
            ) from error
        if "more than 1 value per channel" in text:
            raise TrainingError(
                f"batch norm cannot train on one value per channel (batch size {plan.batch_size}); "
                "try a larger finetune.batch_size or finetune.image_size, or finetune.strategy: lora"
            ) from error
        raise TrainingError(f"training stopped: {text}") from error


class Recorder:
    """The history of a training and its best weights, on disk beside the checkpoints.

    The best weights carry their epoch, and the scores of the validation examples, in one file, so that a kill between
    two writes cannot pair the weights of one epoch with the numbers of another.
    """

    def __init__(self, folder: Path, plan: TrainingPlan) -> None:
        import json

        self.folder = folder
        self.plan = plan
        self.advance: Any = lambda steps=1: None
        file = folder / HISTORY
        self.history: list[dict[str, float]] = json.loads(file.read_text()) if file.is_file() else []
        self.epoch_started = time.monotonic()
        self.losses: list[float] = []
        self.step = 0
        self.scores: np.ndarray | None = None
        self.writes = True
        """False in all processes of a training but one."""
        self.state_of: Callable[[torch.nn.Module], dict[str, torch.Tensor]] = trainable_state

    def see_loss(self, loss: float, step: int) -> None:
        """Raises `Diverged` where the loss is not finite."""
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} at step {step}, at learning rates {self.plan.rates.summary}; try rates ten times "
                "lower (finetune.backbone_learning_rate, finetune.head_learning_rate)",
                step,
            )
        self.losses.append(loss)
        self.step = step

    def see_epoch(self, epoch: int, metrics: dict[str, float], model: torch.nn.Module) -> None:
        """Record an evaluation; keep the weights when they are the best so far."""
        import torch
        from safetensors.torch import save_file

        from stages.artifact import write_json

        self.history = [entry for entry in self.history if entry["epoch"] < epoch]
        entry = {
            "epoch": epoch,
            "train_loss": sum(self.losses) / len(self.losses) if self.losses else 0.0,
            "validation_loss": metrics["eval_loss"],
            "validation_metric": metrics["eval_metric"],
            "seconds": round(time.monotonic() - self.epoch_started, 2),
        }
        if not math.isfinite(entry["validation_loss"]):
            raise Diverged(f"the validation loss is {entry['validation_loss']} after epoch {epoch}", self.step)
        if not self.history or rank_of(entry) > max(rank_of(one) for one in self.history):
            # Cloned, because safetensors refuses tied weights that share memory.
            state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in self.state_of(model).items()}
            if self.writes:
                assert self.scores is not None
                scores = {SCORES: torch.from_numpy(self.scores)}
                save_file(state | scores, self.folder / "best.tmp", {"epoch": str(epoch)})
                (self.folder / "best.tmp").replace(self.folder / BEST)
        self.history.append(entry)
        if self.writes:
            write_json(self.folder / HISTORY, self.history)
        self.losses = []

    def should_stop(self) -> bool:
        """Whether `patience` epochs have passed since the best one, or all epochs are done."""
        ranks = [rank_of(entry) for entry in self.history]
        since_best = len(ranks) - 1 - ranks.index(max(ranks)) if ranks else 0
        return since_best >= self.plan.patience or len(ranks) >= self.plan.epochs

    def restore_best(self, model: torch.nn.Module) -> Trained:
        """Put the best weights back into the network."""
        from safetensors import safe_open

        if not self.history:
            raise TrainingError("training ended without an evaluation; raise finetune.epochs")
        with safe_open(self.folder / BEST, framework="pt") as stored:
            epoch = int(stored.metadata()["epoch"])
            state = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        scores = state.pop(SCORES).numpy()
        missing = trainable_state(model).keys() - state.keys()
        unexpected = model.load_state_dict(state, strict=False).unexpected_keys
        if missing or unexpected:
            raise TrainingError(
                f"{self.folder / BEST} does not fit the network (missing {sorted(missing)[:2]}, unexpected "
                f"{unexpected[:2]}); run finetune again with --force"
            )
        return Trained(epoch, self.history, scores)


def rank_of(entry: dict[str, float]) -> tuple[float, float]:
    """Larger is better: the validation metric, then a lower loss."""
    return entry["validation_metric"], -entry["validation_loss"]


def trainable_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Everything that training can change: parameters with gradients, and buffers."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    buffers = {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in trainable | buffers}


def choose_precision(asked: str, device: str) -> str:
    """fp32, bf16 or fp16. `auto` is bf16 on a GPU that has it, else fp32.

    Raises:
        MissingCapabilityError: half precision was asked for and this device cannot train in it.
    """
    import torch

    able = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "auto":
        return "bf16" if able else "fp32"
    if asked != "fp32" and (device == "cpu" or (asked == "bf16" and not able)):
        raise MissingCapabilityError(
            f"finetune.precision: {asked} was asked for, but the device {device} does not train in it; "
            "write precision: auto, or use a GPU that has it (device: cuda)"
        )
    return asked


def make_trainer(
    model: torch.nn.Module,
    processing: Processing,
    examples: Sequence[Example],
    validation: Sequence[Example],
    plan: TrainingPlan,
    context: StageContext,
    folder: Path,
    recorder: Recorder,
) -> Trainer:
    """A Trainer with this project's loss, parameter groups and callbacks."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from models.classifier import for_loss, hold_batchnorm
    from stages.finetune.rates import parameter_groups

    names, task = [tensor.name for tensor in processing.inputs], task_of(context.task)
    precision = choose_precision(plan.precision, context.device)

    class ClassifierTrainer(Trainer):
        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if model.training and "image" in inputs:
                inputs = {**inputs, "image": augmented(inputs["image"], plan.augment)}
            logits = model(*(inputs[name] for name in names))  # float32 (batch, outputs)
            loss = task.loss(for_loss(self.model, logits.float()), inputs["labels"])
            if model.training:
                # Of the whole batch, and where it is not finite all processes must know: they wait for each other.
                whole = self.accelerator.reduce(loss.detach(), "mean") if plan.processes > 1 else loss
                recorder.see_loss(whole.item(), self.state.global_step)
            return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

        def get_train_dataloader(self) -> Any:
            # The setting would hold for evaluation too, which must see every example.
            self.args.dataloader_drop_last = drop_last(len(examples), plan.batch_size)
            try:
                return super().get_train_dataloader()
            finally:
                self.args.dataloader_drop_last = False

    def judge(found: Any) -> dict[str, float]:
        # `predictions`: float32 (samples, outputs), `label_ids`: the task's targets
        recorder.scores = scores = task.scores(found.predictions, found.label_ids)
        # The mean that the Trainer takes itself counts examples twice that fill up the share of a process.
        outputs, targets = torch.from_numpy(found.predictions).float(), torch.from_numpy(found.label_ids)
        with torch.no_grad():
            loss = task.loss(for_loss(model, outputs), targets)
        return {"metric": float(scores.mean()), "whole_loss": float(loss)}

    class Report(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recorder.advance(1)

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recorder.epoch_started = time.monotonic()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.accelerator.wait_for_everyone()  # each process writes a part
            if recorder.writes:
                (folder / f"checkpoint-{state.global_step}" / COMPLETE).touch()

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            whole = {**metrics, "eval_loss": metrics["eval_whole_loss"]}
            recorder.see_epoch(round(state.epoch), whole, kwargs["model"])
            entry = recorder.history[-1]
            context.log.info(
                "%-10s epoch %d/%d: validation %s %.4f, loss %.4f (%.0f s)", "", entry["epoch"], plan.epochs,
                task.metric, entry["validation_metric"], entry["validation_loss"], entry["seconds"],
            )  # fmt: skip
            if recorder.should_stop():
                control.should_training_stop = True

    if plan.hold_batchnorm:
        hold_batchnorm(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=plan.epochs,
        per_device_train_batch_size=plan.batch_size // plan.processes,
        per_device_eval_batch_size=max(plan.batch_size, 64),
        learning_rate=plan.rates.head,
        lr_scheduler_type="cosine",
        warmup_steps=round(plan.warmup_fraction * plan.epochs * steps_per_epoch(len(examples), plan.batch_size)),
        max_grad_norm=1.0,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=plan.seed,
        data_seed=plan.seed,
        use_cpu=context.device == "cpu",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        dataloader_num_workers=plan.workers,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # nn.DataParallel would take every GPU, and multiply the batch size
    optimizer = torch.optim.AdamW(parameter_groups(model, plan.rates, plan.weight_decay), lr=plan.rates.head)
    trainer = ClassifierTrainer(
        model=model,
        args=arguments,
        data_collator=make_collate(processing, task, len(context.data.labels)),
        train_dataset=ExampleDataset(examples),
        eval_dataset=ExampleDataset(validation),
        compute_metrics=judge,
        callbacks=[Report()],
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)  # standard output belongs to the result
    recorder.writes = trainer.accelerator.is_main_process
    if trainer.is_fsdp_enabled:  # no process has the whole network
        own = set(trainable_state(model))

        def gathered(_: torch.nn.Module) -> dict[str, torch.Tensor]:
            whole = trainer.accelerator.get_state_dict(trainer.model_wrapped)
            return {name: tensor for name, tensor in whole.items() if name in own}

        recorder.state_of = gathered
    return trainer
