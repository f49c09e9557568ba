"""Every mistake is listed at once, with its line and the nearest known key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from models.errors import ConfigError
from pipeline.config import RECIPES, PipelineConfig, find_beside, load_config
from pipeline.init import write_config
from stages.artifact import SCHEMA_VERSION

GOOD = "task: image-classification\nbackbone: timm:tf_efficientnet_lite0\ndata:\n  source: demo:fashion-mnist\n"


VISION = "task: image-classification\nbackbone: timm:tf_efficientnet_lite0\ndata: {source: demo:fashion-mnist}\n"


def write(folder: Path, text: str) -> Path:
    file = folder / "pipeline.yaml"
    file.write_text(text)
    return file


def test_three_mistakes_are_three_problems_with_lines(tmp_path: Path) -> None:
    text = (
        GOOD.replace("demo:fashion-mnist", "demo:fashion-mnist\n  sourse: x") + "finetune:\n  epoch: 3\nseed: minus\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    problems = [str(problem) for problem in caught.value.problems]
    assert len(problems) == 3
    assert any(":5 data.sourse: unknown key (did you mean 'source'?)" in problem for problem in problems)
    assert any(":7 finetune.epoch: unknown key (did you mean 'epochs'?)" in problem for problem in problems)
    assert any(":8 seed: found 'minus'" in problem for problem in problems)


def test_an_unknown_backbone_is_listed_beside_the_other_mistakes(tmp_path: Path) -> None:
    text = GOOD.replace("tf_efficientnet_lite0", "tf_efficientnet_lite00") + "sead: 1\n"
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert len(caught.value.problems) == 2
    assert "tf_efficientnet_lite0" in str(caught.value)
    assert "did you mean 'seed'" in str(caught.value)


def test_data_that_is_not_there_is_listed_beside_the_other_mistakes(tmp_path: Path) -> None:
    text = GOOD.replace("demo:fashion-mnist", "demo:fashion-mnits") + "sead: 1\n"
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    problems = [str(problem) for problem in caught.value.problems]
    assert len(problems) == 2
    assert any("yaml:4 data.source" in one and "did you mean demo:fashion-mnist?" in one for one in problems)


def test_missing_keys_say_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"backbone: is missing \(timm:<name>"):
        load_config(write(tmp_path, "task: image-classification\ndata:\n  source: demo:fashion-mnist\n"))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="stands twice"):
        load_config(write(tmp_path, GOOD + "seed: 1\nseed: 2\n"))


def test_settings_override_the_file_and_are_named_when_wrong(tmp_path: Path) -> None:
    config, _ = load_config(write(tmp_path, GOOD), ["finetune.epochs=9", "seed=4"])
    assert (config.finetune.epochs, config.seed) == (9, 4)
    with pytest.raises(ConfigError, match="--set finetune.epochs=many"):
        load_config(write(tmp_path, GOOD), ["finetune.epochs=many"])
    with pytest.raises(ConfigError, match="--set backbone=timm:none"):  # not the line of the file that it overrides
        load_config(write(tmp_path, GOOD), ["backbone=timm:none"])
    with pytest.raises(ConfigError, match="not of the form"):
        load_config(write(tmp_path, GOOD), ["nonsense"])


def test_a_setting_of_an_unknown_section_is_named_as_a_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--set finetun\.epochs=3 finetun: unknown key \(did you mean 'finetune'"):
        load_config(write(tmp_path, GOOD), ["finetun.epochs=3"])


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize(
    "key", ["validate.gates.min_sqnr_db", "merge_lora.max_relative_error", "finetune.weight_decay"]
)
def test_no_threshold_and_no_rate_is_nan_or_infinite(tmp_path: Path, key: str, value: str) -> None:
    file = write(tmp_path, VISION)
    with pytest.raises(ConfigError, match="finite number"):
        load_config(file, [f"{key}={value}"])


def test_settings_that_contradict_each_other_are_named_without_the_whole_section(tmp_path: Path) -> None:
    file = write(tmp_path, VISION)
    with pytest.raises(ConfigError) as caught:
        load_config(file, ["finetune.strategy=lp-ft", "finetune.initial_head=random"])
    (problem,) = caught.value.problems
    assert problem.message == "lp-ft starts from the probe; with initial_head: random write strategy: full"


def test_empty_sections_mean_their_defaults(tmp_path: Path) -> None:
    config, _ = load_config(write(tmp_path, GOOD + "finetune:\n  lora:\nvalidate:\n"))
    assert config == load_config(write(tmp_path, GOOD))[0]
    with pytest.raises(ConfigError, match="data"):
        load_config(write(tmp_path, "task: image-classification\nbackbone: timm:resnet18\ndata:\n"))


def test_a_file_that_refers_to_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="refers to itself"):
        load_config(write(tmp_path, GOOD + "finetune: &x\n  lora: *x\n"))


def test_paths_are_looked_for_beside_the_file_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project/photos").mkdir(parents=True)
    (tmp_path / "elsewhere/others").mkdir(parents=True)
    file = write(tmp_path / "project", GOOD.replace("demo:fashion-mnist", "photos"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config(file)[0].data.source == str(tmp_path / "project/photos")
    assert load_config(file, ["data.source=others"])[0].data.source == "others"
    monkeypatch.chdir(tmp_path / "project")
    assert load_config(Path("pipeline.yaml"))[0].data.source == "photos"


def test_a_corruption_must_be_one_of_the_task(tmp_path: Path) -> None:
    file = write(tmp_path, VISION + "validate: {robustness: [typos]}\n")
    with pytest.raises(ConfigError, match=r"validate\.robustness: typos is no corruption of image.*gaussian-noise"):
        load_config(file)
    assert load_config(file, ["validate.robustness=[jpeg]"])[0].validate_.robustness == ("jpeg",)
    assert load_config(file, ["validate.robustness=true"])[0].validate_.robustness is True


def test_the_last_release_is_looked_for_beside_the_file_and_must_be_one(tmp_path: Path) -> None:
    file = write(tmp_path, VISION + "validate: {baseline: release.tar}\n")
    with pytest.raises(ConfigError, match="is no bundle, and no run"):
        load_config(file)
    (tmp_path / "release.tar").write_bytes(b"first")
    before = load_config(file)[0].validate_.outside()["baseline"]
    (tmp_path / "release.tar").write_bytes(b"second")
    assert load_config(file)[0].validate_.outside()["baseline"] != before


def test_another_run_is_looked_for_beside_the_file_and_must_be_one(tmp_path: Path) -> None:
    file = write(tmp_path, VISION + "finetune: {from_run: runs/first}\n")
    with pytest.raises(ConfigError, match="holds no merged network"):
        load_config(file)
    merged = tmp_path / "runs/first/merge-lora"
    merged.mkdir(parents=True)
    manifest = {"schema_version": SCHEMA_VERSION, "stage": "merge-lora", "files": {}, "gates": []}
    (merged / "manifest.json").write_text(json.dumps(manifest))
    config, _ = load_config(file)
    assert config.finetune.from_run == str(tmp_path / "runs/first")


def test_not_yaml_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pipeline\.yaml:2"):
        load_config(write(tmp_path, "task: [\nbackbone: }\n"))


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads(recipe: Path) -> None:
    config, spec = load_config(recipe)
    assert config.backbone == spec.id


def test_init_writes_a_file_that_loads_also_with_every_comment_removed(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    write_config(file, "image-classification", "timm:tf_efficientnet_lite0", "demo:fashion-mnist", force=False)
    minimal, _ = load_config(file)
    uncommented = [
        line.removeprefix("# ")
        for line in file.read_text().splitlines()
        if not line.lstrip("# ").strip() or ":" in line or not line.startswith("#")
    ]
    values = [line for line in uncommented if not line.lstrip().startswith("#")]
    keys = {line.split(":")[0] for line in values if line and not line.startswith(" ") and ":" in line}
    assert {"finetune", "export", "quantize", "validate", "package", "seed"} <= keys
    assert minimal == PipelineConfig.model_validate(yaml.safe_load(GOOD))
    with pytest.raises(ConfigError, match="exists"):
        write_config(file, "image-classification", "timm:tf_efficientnet_lite0", "demo:fashion-mnist", force=False)


def test_several_processes_do_not_share_a_contrastive_loss(tmp_path: Path) -> None:
    text = (
        (RECIPES / "image-text.yaml")
        .read_text(encoding="utf-8")
        .replace("finetune:", "finetune:\n  launch: {processes: 2}")
    )
    with pytest.raises(ConfigError, match="compares every pair of a batch with all others"):
        load_config(write(tmp_path, text))


def test_only_a_dual_encoder_has_a_tower_to_lock(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a backbone of image-classification has one tower"):
        load_config(write(tmp_path, f"{GOOD}\nfinetune: {{strategy: lp-ft, locked_tower: text}}\n"))


def test_a_margin_of_a_metric_that_the_task_has_not_is_refused(tmp_path: Path) -> None:
    margins = "validate: {gates: {max_drops: {Spearman: 0.1}}}"
    with pytest.raises(
        ConfigError, match=r":6 validate\.gates\.max_drops: 'Spearman' is no other metric of .*macro F1"
    ):
        load_config(write(tmp_path, f"{GOOD}\n{margins}\n"))
    config, _ = load_config(write(tmp_path, f"{GOOD}\n{margins.replace('Spearman', 'macro F1')}\n"))
    assert config.validate_.gates.max_drops == {"macro F1": 0.1}


def test_waivers_of_no_gate_and_without_an_owner_are_refused_with_their_places(tmp_path: Path) -> None:
    waiver = "{gate: acuracy drop, subject: x, reason: y, expires: 2030-01-01, digest: " + "a" * 64 + "}"
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, f"{GOOD}\nvalidate:\n  waivers:\n    - {waiver}\n"))
    said = "\n".join(str(problem) for problem in caught.value.problems)
    assert "waivers.0.gate: found 'acuracy drop': there is no gate 'acuracy drop'" in said
    assert "waivers.0.owner: is missing" in said


def test_both_parts_of_a_dual_backbone_are_looked_for_beside_the_file(tmp_path: Path) -> None:
    for name in ("image", "text"):
        (tmp_path / name).mkdir()
    values = {"backbone": "image+text", "data": {"source": "x"}}
    find_beside(tmp_path / "pipeline.yaml", values)
    assert values["backbone"] == f"{tmp_path / 'image'}+{tmp_path / 'text'}"
    values = {"backbone": "timm:resnet18+text"}
    find_beside(tmp_path / "pipeline.yaml", values)
    assert values["backbone"] == f"timm:resnet18+{tmp_path / 'text'}"


FEATURES = "task: feature-extraction\nbackbone: {}\ndata:\n  source: {}\n"


def folder_of(folder: Path, *names: str) -> Path:
    """Empty files in a folder by label."""
    for name in names:
        path = folder / "data/a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder / "data"


@pytest.mark.parametrize(
    ("data", "task"),
    [
        ("demo:fashion-mnist", "image-features"), ("demo:wordnet-topics", "text-features"),
        ("demo:asterisk-prompts", "audio-features"), (("b.txt", "c.md"), "text-features"),
        (("b.JPG", "c.md"), "image-features"), (("b.flac",), "audio-features"),
    ],
)  # fmt: skip
def test_feature_extraction_is_the_task_that_the_data_are_for(
    data: str | tuple[str, ...], task: str, tmp_path: Path
) -> None:
    source = data if isinstance(data, str) else folder_of(tmp_path, *data)
    backbone = "timm:resnet18" if task == "image-features" else "hf:sentence-transformers/all-MiniLM-L6-v2"
    assert load_config(write(tmp_path, FEATURES.format(backbone, source)))[0].task == task


@pytest.mark.parametrize(
    ("file", "content", "more", "task"),
    [
        ("a.csv", "text,label\nx,y\n", "", "text-features"), ("a.csv", "audio,label\nx,y\n", "", "audio-features"),
        ("a.jsonl", '\n{"words": "x", "label": "y"}\n{"', "  text_column: words\n", "text-features"),
        ("a.csv", "image,text,label\nx,y,z\n", "  image_column: image\n", "image-features"),
        ("a.parquet", "", "", "audio-features"),
    ],
)  # fmt: skip
def test_of_a_table_the_columns_say_it(file: str, content: str, more: str, task: str, tmp_path: Path) -> None:
    if file == "a.parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"audio": ["x"], "label": ["y"]}), tmp_path / file)
    else:
        (tmp_path / file).write_text(content)
    backbone = "timm:resnet18" if task == "image-features" else "hf:openai/whisper-tiny.en"
    assert load_config(write(tmp_path, FEATURES.format(backbone, file) + more))[0].task == task


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("demo:emoji", "data.source holds images with their texts"), ("hf:some/set", "neither data nor backbone say"),
        ("a.csv", "neither data nor backbone say"), ("data", "neither data nor backbone say"),
        ("a.parquet", "cannot be read as Parquet"),
    ],
)  # fmt: skip
def test_where_it_cannot_be_told_the_task_is_asked_for(source: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,image,label\nx,y,z\n")
    (tmp_path / "a.parquet").write_text("none")
    folder_of(tmp_path, "a.txt", "b.png")
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, FEATURES.format("hf:openai/whisper-tiny.en", source) + "sead: 1\n"))
    task, *others = [str(problem) for problem in caught.value.problems if "data.source" not in problem.place]
    assert ":1 task: feature-extraction is one of three tasks" in task and said in task and "text-features" in task
    assert len(others) == 1 and "did you mean 'seed'" in others[0]


@pytest.mark.parametrize("data", ["", "data: 3\n"])
def test_without_data_feature_extraction_is_not_the_mistake(data: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, f"task: feature-extraction\nbackbone: timm:resnet18\n{data}"))
    (problem,) = map(str, caught.value.problems)
    assert " data" in problem and "text-classification" not in problem


def test_a_backbone_of_timm_takes_images(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, FEATURES.format("timm:resnet18", "hf:some/set")))[0].task == "image-features"
    with pytest.raises(ConfigError, match="did you mean demo:fashion-mnist"):
        load_config(write(tmp_path, FEATURES.format("timm:resnet18", "demo:fashion-mnits")))


def test_init_writes_which_of_the_three_it_is(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    write_config(file, "feature-extraction", "hf:openai/whisper-tiny.en", "demo:asterisk-prompts", force=False)
    assert load_config(file)[0].task == "audio-features"
    with pytest.raises(ConfigError, match="--task: feature-extraction is one of three"):
        write_config(file, "feature-extraction", "hf:openai/whisper-tiny.en", "demo:emoji", force=True)
    assert "feature-extraction" in PipelineConfig.model_json_schema()["properties"]["task"]["enum"]


NAMED = "{strategy: full, initial_head: label-names}"


@pytest.mark.parametrize(
    ("backbone", "task", "finetune", "said"),
    [
        ("timm:resnet18", "image-classification", NAMED, "has no text tower.*all-MiniLM"),
        ("timm:resnet18+hf:a/b", "text-classification", NAMED, "image-classification only"),
        ("hf:a/b", "image-text", "{strategy: flyp}", "image-classification only"),
        ("timm:resnet18+hf:a/b", "image-classification", "{strategy: lora}", "initial_head: label-names"),
        ("hf:a/b", "image-classification", "{strategy: flyp, launch: {processes: 2}}", "flyp compares every pair"),
    ],
)
def test_label_names_want_images_and_a_text_tower(
    backbone: str, task: str, finetune: str, said: str, tmp_path: Path
) -> None:
    text = f"task: {task}\nbackbone: {backbone}\ndata: {{source: x.csv, text_column: a, image_column: b}}\n"
    with pytest.raises(ConfigError, match=said):
        load_config(write(tmp_path, f"{text}finetune: {finetune}\n"))


def test_label_names_take_two_backbones_put_together(tmp_path: Path) -> None:
    text = VISION.replace("tf_efficientnet_lite0", "resnet18+hf:a/b") + f"finetune: {NAMED}\n"
    config, spec = load_config(write(tmp_path, text))
    assert config.finetune.names_labels and spec.library == "dual"
