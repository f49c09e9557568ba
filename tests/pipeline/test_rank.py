"""`pipeline rank` as a user meets it: tables, JSON, ties and sizes, what fails beside what works, exit codes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models.errors import ConfigError, DataError, MissingCapabilityError
from models.modalities.vision import ImageProcessing
from models.registry import resolve
from pipeline.config import PipelineConfig
from pipeline.progress import QuietProgress
from pipeline.rank import Measured, exit_code_of, print_ranking, rank_backbones, read_request, record_of
from stages.data.splits import DataSplits
from stages.transferability.cost import Cost
from stages.transferability.ranking import Candidate
from tests.models.tiny import TIMM, hf_text_folder, image_backbone, saved_checkpoint
from tests.pipeline.tiny_project import make_project, pipeline
from tests.stages.small_run import split_of

ONE_THREAD: dict[str, Any] = {"device": "cpu", "threads": 1, "finetune": {"threads": 1, "batch_size": 12}}
"""Two threads of PyTorch on two busy cores are many times slower than one."""

SINGLE = ("--threads", "1", "--set", "finetune.threads=1")

RESNET = {**TIMM, "name": "resnet18"}
IMAGES = {"task": "image-classification", "data.source": "demo:fashion-mnist"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three backbones beside a configuration: `backbone`, `again` (the same), and `broken` with NaN in it."""
    folder = make_project(tmp_path_factory.mktemp("project"))
    saved_checkpoint(folder / "again", image_backbone())
    loaded = image_backbone()
    with torch.no_grad():
        next(loaded.module.parameters()).fill_(float("nan"))
    saved_checkpoint(folder / "broken", loaded)
    return folder


def rank_in(folder: Path, *backbones: str, **values: Any) -> dict[str, Any]:
    """The record, without a process of its own."""
    data = {"source": str(folder / "photos")}
    config = PipelineConfig.model_validate(
        {"task": "image-classification", "backbone": "x", "data": data, **ONE_THREAD, **values}
    )
    specs = [resolve(str(folder / one)) for one in backbones]
    return rank_backbones(config, specs, logging.getLogger("test"), QuietProgress())


# --- through the console script ---------------------------------------------------------------------


def test_a_table_for_a_person_and_the_others_go_on(project: Path) -> None:
    done = pipeline("rank", "backbone", "broken", "again", "--max-samples", "18", *SINGLE, cwd=project)
    assert done.returncode == 0, done.stderr
    for head in ("linear probe", "kNN", "H-score", "LogME", "FLOPs", "latency p50", "epoch", "training memory"):
        assert head in done.stdout
    assert "not ranked: broken: " in done.stdout and "NaN or infinity" in done.stdout
    assert "broken is left out" in done.stderr and "Traceback" not in done.stderr
    assert "18 training examples of photos, 3 classes" in done.stdout
    assert done.stdout.count("   1=") == 2 and "cannot tell the first 2 apart" in done.stdout
    assert not (project / "runs").exists()


def test_json_is_the_result_and_nothing_else(project: Path) -> None:
    arguments = ("rank", "backbone", "again", "--json", "-c", "pipeline.yaml", "--seed", "3", "-o", "ranking.json")
    done = pipeline(*arguments, "--set", "finetune.batch_size=6", *SINGLE, cwd=project)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == json.loads((project / "ranking.json").read_text(encoding="utf-8"))
    assert record["seed"] == 3 and record["data"]["examples"] == 24 and record["data"]["split"] == "train"
    one, two = record["rows"]
    assert one["scores"] == two["scores"] and one["place"] == two["place"] == 1
    assert one["to_best"]["value"] == 0 and one["to_best"]["low"] < 0 < one["to_best"]["high"]
    assert one["cost"]["batch_size"] == 6 and one["cost"]["parameters"] == two["cost"]["parameters"]
    assert one["ranks"] == {"probe": 1.5, "knn": 1.5, "h_score": 1.5, "log_me": 1.5}
    assert record["smaller_is_enough"] == []


def test_exit_2_lists_every_mistake_and_runs_nothing(tmp_path: Path) -> None:
    done = pipeline(
        "rank", "timm:tf_efficientnet_lite00", "nothing", "hf:a/b/c", "timm:resnet18",
        "--task", "text-classification", "--data", "demo:wordnet", "--output", "none/there.json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "6 problems; nothing was run" in done.stderr, done.stderr
    for part in ("timm:tf_efficientnet_lite0,", "'nothing' has no known prefix", "'a/b/c' is no repository",
                 "timm:resnet18 takes images", "did you mean demo:wordnet-topics", "none/there.json"):  # fmt: skip
        assert part in done.stderr, part
    assert "Traceback" not in done.stderr


def test_the_own_exit_code_where_nothing_could_be_ranked(project: Path) -> None:
    done = pipeline("rank", "broken", "--json", cwd=project)
    record = json.loads(done.stdout)
    assert done.returncode == 4 == record["rows"][0]["exit_code"]
    assert record["rows"][0]["place"] is None and "NaN" in record["rows"][0]["error"]


# --- what is asked for ------------------------------------------------------------------------------


def test_without_a_file_task_and_data_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as found:
        read_request(
            ["timm:resnet18", "nothing"], None, {"task": "image-classification", "data.source": None}, [], None
        )
    assert [problem.place for problem in found.value.problems] == ["backbone nothing", "--data"]
    config, specs = read_request(
        ["timm:resnet18", "timm:resnet18"], None, {**IMAGES, "seed": 7, "threads": None}, [], None
    )
    assert config.seed == 7 and config.threads == 2 and [spec.id for spec in specs] == ["timm:resnet18"]


@pytest.mark.parametrize(
    ("task", "data", "said"),
    [
        ("image-features", "demo:fashion-mnist", "write image-classification, which reads the same labels"),
        ("feature-extraction", "demo:fashion-mnist", "image-features has embeddings in its place"),
        ("image-multilabel", "demo:fashion-mnist-grids", "image-multilabel has none"),
    ],
)
def test_a_task_that_is_not_ranked_says_what_is(task: str, data: str, said: str) -> None:
    with pytest.raises(ConfigError) as found:
        read_request(["timm:resnet18"], None, {"task": task, "data.source": data}, [], None)
    assert said in " ".join(map(str, found.value.problems))


def test_options_win_over_the_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    options = {"task": None, "data.source": "photos/train", "data.max_train_samples": 9, "finetune.image_size": 64}
    config, _ = read_request(["backbone"], None, options, ["finetune.image_size=48", "threads=1"], None)
    assert config.data.source == "photos/train" and config.data.max_train_samples == 9
    assert config.finetune.image_size == 64 and config.threads == 1
    assert config.finetune.batch_size == 12  # the file's


# --- what is said -----------------------------------------------------------------------------------


def made_up_record(*measured: tuple[str, int, int, dict[str, float]], **cost: Any) -> dict[str, Any]:
    """A ranking of 200 examples from (name, parameters, how many its probe gets right, other scores)."""
    rows = []
    for name, parameters, right, scores in measured:
        values = {"probe": right / 200, "knn": 0.5, "h_score": 1.0, "log_me": 0.0, **scores}
        candidate = Candidate(name, parameters, values, np.arange(200) < right)
        spec = resolve("timm:resnet18").__class__(name, "timm", name, None, None, "hub", "0")
        times = Cost(parameters, 10, 1.0, 1.0, 2.0, 100, 8, "cpu", 1, disturbed=False)
        rows.append(Measured(spec, candidate, Cost(**{**vars(times), **cost}), 16))
    labels = np.arange(200) % 2
    data = DataSplits(("a", "b"), {"train": split_of([str(one) for one in labels], list(labels))}, {"train": "f"})
    config = PipelineConfig.model_validate(
        {"task": "image-classification", "backbone": "x", "data": {"source": "demo:fashion-mnist"}}
    )
    return record_of(config, data, labels, 5, "cpu", rows)


def test_the_larger_one_is_not_the_better_one(capsys: pytest.CaptureFixture[str]) -> None:
    record = made_up_record(("large", 90_000_000, 150, {}), ("small", 10_000_000, 180, {}))
    assert [row["backbone"] for row in record["rows"]] == ["small", "large"]
    assert record["smaller_is_enough"][0]["difference"]["value"] == pytest.approx(0.15)
    print_ranking(record)
    printed = capsys.readouterr().out
    expected = "the larger is not the better: small is 9.0 times smaller than large and more accurate, +15.0 pt (+10."
    assert expected in printed and "90 M" in printed


def test_a_smaller_one_that_is_tied_is_said_to_be_that_and_no_more() -> None:
    record = made_up_record(("large", 90, 181, {}), ("small", 10, 180, {}))
    said = "\n".join(record["findings"])
    assert "the larger is not shown to be better: small is 9.0 times smaller than large and tied with it" in said
    assert "200 examples cannot tell the first 2 apart; more could" in said


def test_where_the_larger_one_is_better_size_is_not_mentioned() -> None:
    record = made_up_record(("large", 90, 180, {}), ("small", 10, 150, {}))
    assert record["findings"] == [] and record["smaller_is_enough"] == []
    assert [row["place"] for row in record["rows"]] == [1, 2]


def test_disagreement_about_the_best_is_said() -> None:
    record = made_up_record(("a", 10, 150, {"h_score": 3.0}), ("b", 10, 180, {"h_score": 2.0, "log_me": 1.0}))
    (said,) = (line for line in record["findings"] if "disagree" in line)
    assert said == "the scores disagree about the best: linear probe: b; kNN: b, a; H-score: a; LogME: b"
    assert record["agreement_with_probe"] == pytest.approx({"knn": None, "h_score": -1, "log_me": 1})
    agreed = made_up_record(("a", 10, 150, {"h_score": 1.0}), ("b", 10, 180, {"h_score": 2.0, "log_me": 1.0}))
    assert not [line for line in agreed["findings"] if "disagree" in line]


def test_a_disturbed_machine_and_a_poor_probe_are_said() -> None:
    record = made_up_record(("a", 10, 90, {}), disturbed=True, epoch_s=None, problem="cannot be trained as it is: no")
    said = "\n".join(record["findings"])
    assert "no backbone beats the majority class, which alone gives 50.0%" in said
    assert "the times are too long" in said and "a cannot be trained as it is: no" in said


# --- the work ---------------------------------------------------------------------------------------


def test_the_scores_are_those_of_the_train_split_alone(project: Path, tmp_path: Path) -> None:
    import shutil

    before = rank_in(project, "backbone")["rows"][0]["scores"]
    copied = Path(shutil.copytree(project, tmp_path / "copy"))
    for split in ("validation", "test"):
        for label in ("blue", "green"):
            first, *_, last = sorted((copied / "photos" / split / label).iterdir())
            first.replace(last)
    assert rank_in(copied, "backbone")["rows"][0]["scores"] == before
    (copied / "photos/train/red/002.png").replace(copied / "photos/train/green/900.png")
    assert rank_in(copied, "backbone")["rows"][0]["scores"] != before


def test_features_are_computed_once_a_backbone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.rank as module

    seen: list[int] = []
    real = module.compute_features

    def counted(model: Any, processing: Any, examples: Any, *rest: Any) -> Any:
        seen.append(len(examples))
        return real(model, processing, examples, *rest)

    monkeypatch.setattr(module, "compute_features", counted)
    record = rank_in(project, "backbone", "again")
    assert seen == [record["data"]["examples"]] * 2 and len(record["rows"]) == 2


def test_features_that_never_vary_are_an_error_of_that_backbone(project: Path) -> None:
    loaded = image_backbone()
    with torch.no_grad():
        for part in loaded.module.modules():
            if isinstance(part, nn.Conv2d | nn.BatchNorm2d):
                part.weight.zero_()
    saved_checkpoint(project / "dead", loaded)
    record = rank_in(project, "dead", "backbone")
    assert [row["backbone"].rpartition("/")[2] for row in record["rows"]] == ["backbone", "dead"]
    assert "gives every example the same features" in record["rows"][1]["error"]
    assert exit_code_of(record) == 0


def test_a_text_backbone_among_pictures_is_a_row_with_its_reason(project: Path) -> None:
    hf_text_folder(project / "words")
    record = rank_in(project, "words", "backbone")
    assert record["rows"][0]["place"] == 1 and record["rows"][1]["error"]


def test_weights_that_cannot_be_had_are_a_row_with_their_own_code(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.rank as module

    def refuse(*_: Any) -> Any:
        raise MissingCapabilityError("the weights could not be had; connect this machine")

    monkeypatch.setattr(module, "pin", refuse)
    record = rank_in(project, "backbone")
    assert exit_code_of(record) == 3 and record["findings"] == []


def test_too_little_data_is_an_error_of_the_data(project: Path) -> None:
    with pytest.raises(DataError, match="two classes with 4 examples"):
        rank_in(project, "backbone", data={"source": str(project / "photos"), "max_train_samples": 6})


@pytest.mark.slow
def test_real_weights_beat_a_larger_network_without_them(tmp_path: Path) -> None:
    """EfficientNet-Lite0 with its ImageNet weights (3.4 M parameters) and ResNet-18 with random ones (11 M)."""
    loaded = image_backbone(RESNET, 64)
    assert isinstance(loaded.processing, ImageProcessing)
    saved_checkpoint(tmp_path / "large", loaded)
    options = {**IMAGES, "data.max_train_samples": 150, "finetune.image_size": 64}
    ids = [str(tmp_path / "large"), "timm:tf_efficientnet_lite0"]
    config, specs = read_request(ids, None, options, ["device=cpu", "threads=1", "finetune.threads=1"], None)
    record = rank_backbones(config, specs, logging.getLogger("test"), QuietProgress())
    first, second = record["rows"]
    assert first["backbone"] == "timm:tf_efficientnet_lite0" and (first["place"], second["place"]) == (1, 2)
    assert first["scores"]["probe"] > 0.65 > second["scores"]["probe"] + 0.1
    assert all(first["scores"][name] > second["scores"][name] for name in first["scores"])
    assert first["cost"]["parameters"] * 3 < second["cost"]["parameters"]
    assert any("3.3 times smaller" in line and "more accurate" in line for line in record["findings"])


def test_pairs_of_texts_are_ranked(tmp_path: Path) -> None:
    hf_text_folder(tmp_path / "bert")
    rows = [f"{('a good', 'bad red')[n % 2]} {'tree ' * (n % 5)},runs {'bird ' * (n // 5)},{n % 2}" for n in range(60)]
    (tmp_path / "pairs.csv").write_text("text,second,label\n" + "\n".join(rows), encoding="utf-8")
    data = {"source": str(tmp_path / "pairs.csv"), "text_pair_column": "second"}
    (row,) = rank_in(tmp_path, "bert", task="text-classification", data=data)["rows"]
    assert row.get("error") is None and row["scores"]["probe"] > 0.5
