"""Training: interrupted and resumed, the best epoch kept, stopped early."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models.errors import TrainingError
from models.layers import Layer
from stages.artifact import digest_files
from stages.data.splits import DataSplits
from stages.finetune import Finetune, FinetuneConfig
from stages.finetune.rates import one_rate
from stages.finetune.training import (
    COMPLETE,
    Diverged,
    Recorder,
    TrainingPlan,
    augmented,
    drop_last,
    flip_half,
    last_complete_checkpoint,
    steps_per_epoch,
    translated_errors,
)
from tests.stages.small_run import StoppingProgress, made_up_data, make_context

CONFIG = FinetuneConfig(strategy="lora", epochs=2, batch_size=8)
PLAN = TrainingPlan(
    epochs=5, batch_size=8, rates=one_rate([Layer("stem", ())], 1e-3, 1e-4), weight_decay=0.01,
    warmup_fraction=0.1, patience=2, precision="fp32", augment="none", hold_batchnorm=False, workers=0, seed=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> DataSplits:
    return made_up_data("image")


def digests_of_an_undisturbed_run(root: Path, data: DataSplits) -> dict[str, str]:
    context = make_context(root, "undisturbed", data)
    Finetune().run(context, CONFIG)
    return digest_files(context.output)


def interrupt_in_second_epoch(root: Path, data: DataSplits) -> Path:
    """The resume folder of a run that was interrupted at step 5 of 6, after the first epoch's checkpoint."""
    context = make_context(root, "out", data, progress=StoppingProgress("training", 5))
    with pytest.raises(KeyboardInterrupt):
        Finetune().run(context, CONFIG)
    shutil.rmtree(context.output)
    return context.resume


def test_a_resumed_run_equals_an_undisturbed_one(
    tmp_path: Path, data: DataSplits, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = digests_of_an_undisturbed_run(tmp_path, data)
    resume = interrupt_in_second_epoch(tmp_path, data)
    assert (resume / "trainer" / "checkpoint-3" / COMPLETE).is_file()
    with caplog.at_level("INFO", logger="test"):
        Finetune().run(make_context(tmp_path, "out", data), CONFIG)
    assert "resumes at checkpoint-3" in caplog.text
    assert digest_files(tmp_path / "out") == wanted


def test_half_a_checkpoint_is_not_resumed(tmp_path: Path, data: DataSplits, caplog: pytest.LogCaptureFixture) -> None:
    wanted = digests_of_an_undisturbed_run(tmp_path, data)
    resume = interrupt_in_second_epoch(tmp_path, data)
    # As kill -9 in the middle of a save leaves it: the newest folder lacks files and the mark.
    half = resume / "trainer" / "checkpoint-6"
    shutil.copytree(resume / "trainer" / "checkpoint-3", half)
    for name in (COMPLETE, "trainer_state.json", "optimizer.pt"):
        (half / name).unlink()
    with caplog.at_level("INFO", logger="test"):
        Finetune().run(make_context(tmp_path, "out", data), CONFIG)
    assert "resumes at checkpoint-3" in caplog.text
    assert digest_files(tmp_path / "out") == wanted


def test_a_run_stopped_after_training_trains_no_more(
    tmp_path: Path, data: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stages.finetune.stage as stage

    def fail(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "describe_result", fail)
        with pytest.raises(KeyboardInterrupt):
            Finetune().run(make_context(tmp_path, "out", data), CONFIG)
    first = digest_files(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    Finetune().run(make_context(tmp_path, "out", data, progress=StoppingProgress("training", 1)), CONFIG)
    again = digest_files(tmp_path / "out")
    assert {name: again[name] for name in first} == first


def test_incomplete_checkpoints_are_removed(tmp_path: Path) -> None:
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"  # by number, not by name
    assert not (tmp_path / "checkpoint-11").exists()
    assert last_complete_checkpoint(tmp_path / "none") is None


def see(recorder: Recorder, model: nn.Linear, epoch: int, accuracy: float, loss: float) -> None:
    """One epoch whose weights are all `epoch`."""
    with torch.no_grad():
        model.weight.fill_(epoch)
    recorder.scores = np.array([1.0, 0.0, float(epoch == 3)])
    recorder.see_epoch(epoch, {"eval_metric": accuracy, "eval_loss": loss}, model)


def test_the_best_epoch_is_kept_and_ties_go_to_the_lower_loss(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    recorder = Recorder(tmp_path, PLAN)
    for epoch, accuracy, loss in ((1, 0.5, 1.0), (2, 0.7, 0.9), (3, 0.7, 0.8), (4, 0.7, 0.85)):
        see(recorder, model, epoch, accuracy, loss)
        assert not recorder.should_stop()
    see(recorder, model, 5, 0.6, 0.1)
    assert recorder.should_stop()
    trained = Recorder(tmp_path, PLAN).restore_best(model)  # from disk, as a resumed run would
    assert trained.best_epoch == 3 and trained.scores is not None
    assert trained.scores.tolist() == [1.0, 0.0, 1.0]
    assert torch.equal(model.weight, torch.full((2, 2), 3.0))


def test_patience_stops_before_the_last_epoch(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, PLAN)
    model = nn.Linear(2, 2)
    see(recorder, model, 1, 0.9, 0.1)
    see(recorder, model, 2, 0.8, 0.2)
    assert not recorder.should_stop()
    see(recorder, model, 3, 0.8, 0.2)
    assert recorder.should_stop()


def test_best_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, PLAN)
    see(recorder, nn.Linear(2, 2), 1, 0.9, 0.1)
    with pytest.raises(TrainingError, match=r"does not fit the network.*--force"):
        recorder.restore_best(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_validation_loss_that_is_not_finite_is_divergence(tmp_path: Path, loss: float) -> None:
    recorder = Recorder(tmp_path, PLAN)
    with pytest.raises(Diverged, match="after epoch 1"):
        see(recorder, nn.Linear(2, 2), 1, 0.9, loss)
    with pytest.raises(Diverged, match="at step 3, at learning rates") as caught:
        recorder.see_loss(loss, 3)
    assert caught.value.step == 3


@pytest.mark.parametrize(
    ("examples", "dropped", "steps"), [(33, True, 1), (32, False, 1), (34, False, 2), (1, False, 1)]
)
def test_a_last_batch_of_one_is_dropped(examples: int, dropped: bool, steps: int) -> None:
    assert drop_last(examples, 32) is dropped
    assert steps_per_epoch(examples, 32) == steps


def test_flip_mirrors_whole_images_left_to_right() -> None:
    torch.manual_seed(0)
    batch = torch.arange(16 * 2 * 3 * 3, dtype=torch.uint8).view(16, 2, 3, 3)
    flipped = flip_half(batch)
    mirrored = [bool(torch.equal(new, old.flip(1))) for new, old in zip(flipped, batch, strict=True)]
    same = [bool(torch.equal(new, old)) for new, old in zip(flipped, batch, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 0 < sum(mirrored) < 16


def test_crop_resizes_another_part_of_each_image_and_mirrors_half() -> None:
    torch.manual_seed(0)
    ramp = torch.arange(64, dtype=torch.uint8)[None, None, :, None] * 4  # brighter from left to right
    batch = ramp.expand(16, 64, 64, 3)
    found = augmented(batch, "crop")
    assert (found.shape, found.dtype) == (batch.shape, torch.uint8)
    assert augmented(batch, "none") is batch
    ends = found[:, 32, [0, 63], 0].long()
    assert 0 < sum(bool(left > right) for left, right in ends) < 16
    shares = (ends[:, 1] - ends[:, 0]).abs() / (4 * 63)
    assert float(shares.min()) > (0.6 * 3 / 4) ** 0.5 - 0.05  # the narrowest: three quarters as wide as high
    assert len({tuple(pair.sort().values.tolist()) for pair in ends}) > 8


@pytest.mark.parametrize(
    ("error", "wanted", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), TrainingError, "finetune.batch_size=4"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), TrainingError, "finetune.batch_size=4"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), TrainingError, "training stopped: mat1"),
    ],
)
def test_errors_of_libraries_are_translated(error: Exception, wanted: type[Exception], message: str) -> None:
    with pytest.raises(wanted, match=message) as caught, translated_errors(PLAN):
        raise error
    assert caught.value.__cause__ is error
