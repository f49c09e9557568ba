"""package: what validate measured and nothing else, the same bytes each time, and a card that says how good it is."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.bundle import open_bundle
from models.errors import IntegrityError
from models.modalities.text import TextProcessing
from models.modalities.vision import ImageProcessing
from stages.artifact import Artifact, sha256_of_file, write_json
from stages.data.splits import Example
from stages.package import (
    Package,
    PackageConfig,
    default_name,
    gates_table,
    golden_examples,
    on_provider,
    plain,
    write_sample,
)
from tests.models.tiny import edit_json, png, tokenizer_json
from tests.stages.chain import LABELS, artifact_of, context_of, packed, test_split, validated

NAME = PackageConfig(name="tiny")


def with_evidence(folder: Path, **changes: Any) -> dict[str, Artifact]:
    """The chain's artifacts with other evidence."""
    artifacts = validated()
    evidence = json.loads(artifacts["validate"].file("evidence.json").read_text())
    folder.mkdir()
    write_json(folder / "evidence.json", evidence | changes)
    return artifacts | {"validate": artifact_of("validate", folder)}


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    Package().run(context_of(tmp_path / "again", validated()), PackageConfig(name="tiny", include="all-passed"))
    assert sha256_of_file(tmp_path / "again/tiny.tar") == sha256_of_file(packed() / "tiny.tar")


def test_the_tar_names_no_time_and_no_person() -> None:
    with tarfile.open(packed() / "tiny.tar") as archive:
        members = archive.getmembers()
    assert [one.name for one in members] == sorted(one.name for one in members)
    assert {(one.mtime, one.uid, one.gid, one.uname, one.gname, one.mode) for one in members} == {
        (0, 0, 0, "", "", 0o644)
    }
    assert "tiny/bundle.json" in [one.name for one in members]


def test_the_shipped_bytes_are_those_that_were_measured(tmp_path: Path) -> None:
    evidence = json.loads((packed() / "bundle/evidence/evidence.json").read_text())
    measured = {one["name"]: one["sha256"] for one in evidence["candidates"]}
    with open_bundle(packed() / "bundle") as opened:
        assert opened.chosen == evidence["chosen"] and set(opened.manifest["models"]) == set(measured)
        for name, entry in opened.manifest["models"].items():
            assert sha256_of_file(opened.file(entry["file"])) == entry["sha256"] == measured[name]
    Package().run(context_of(tmp_path / "chosen", validated()), NAME)
    assert [path.name for path in (tmp_path / "chosen/bundle/model").iterdir()] == ["model.onnx"]


def test_bytes_that_validate_did_not_measure_are_refused(tmp_path: Path) -> None:
    artifacts = validated()
    evidence = json.loads(artifacts["validate"].file("evidence.json").read_text())
    entry = next(one for one in evidence["candidates"] if one["name"] == evidence["chosen"])
    folder = Path(shutil.copytree(artifacts[entry["stage"]].folder, tmp_path / "changed"))
    with (folder / entry["file"]).open("ab") as stream:
        stream.write(b"\0")
    changed = artifact_of(entry["stage"], folder)  # whose own manifest agrees with the changed file
    with pytest.raises(IntegrityError, match="not the file that validate measured"):
        Package().run(context_of(tmp_path / "out", artifacts | {entry["stage"]: changed}), NAME)
    (folder / entry["file"]).unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        Package().run(context_of(tmp_path / "out2", artifacts | {entry["stage"]: changed}), NAME)


@pytest.mark.parametrize("chosen", [None, "onnx-unheard-of"])
def test_without_a_choice_nothing_is_packed(tmp_path: Path, chosen: str | None) -> None:
    inputs = with_evidence(tmp_path / "validate", chosen=chosen)
    with pytest.raises(IntegrityError, match="validate chose"):
        Package().run(context_of(tmp_path / "out", inputs), NAME)


def test_a_chosen_candidate_that_failed_is_not_packed(tmp_path: Path) -> None:
    evidence = json.loads(validated()["validate"].file("evidence.json").read_text())
    candidates = [one | {"passed": False} for one in evidence["candidates"]]
    inputs = with_evidence(tmp_path / "validate", candidates=candidates)
    with pytest.raises(IntegrityError, match="not one candidate whose gates all passed"):
        Package().run(context_of(tmp_path / "out", inputs), NAME)


def test_a_bundle_that_does_not_verify_fails_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed tar is opened and run as a device would; here its tolerance is below every rounding."""
    monkeypatch.setattr("stages.package.GOLDEN_TOLERANCES", dict.fromkeys(("fp32", "fp16", "int8"), float("nan")))
    with pytest.raises(ValueError, match="JSON"):
        Package().run(context_of(tmp_path / "nan", validated()), NAME)
    monkeypatch.setattr("stages.package.GOLDEN_TOLERANCES", dict.fromkeys(("fp32", "fp16", "int8"), -1.0))
    result = Package().run(context_of(tmp_path / "out", validated()), NAME)
    assert [gate.verdict for gate in result.gates] == ["fail"]
    assert "golden outputs" in result.gates[0].message


def test_golden_samples_take_every_label_in_turn() -> None:
    examples = [Example("", label, "", str(index)) for index, label in enumerate([0, 0, 0, 1, 2, 1])]
    assert [one.origin for one in golden_examples(examples, 4)] == ["0", "3", "4", "1"]
    assert len(golden_examples(examples, 99)) == 6
    with open_bundle(packed() / "bundle") as opened:
        assert {one["label"] for one in opened.manifest["golden"]["samples"]} == set(LABELS)


def test_golden_inputs_are_the_originals(tmp_path: Path) -> None:
    """Encoded images stay byte for byte: decoding them is part of what the device must do right."""
    (tmp_path / "photo.png").write_bytes(png(9, 7))
    for index, content in enumerate((png(9, 7), tmp_path / "photo.png")):
        name = write_sample(tmp_path, index, ImageProcessing(8, 8), content)
        assert (tmp_path / name).read_bytes() == png(9, 7) and name.endswith(".png")
    pixels = np.arange(75, dtype=np.uint8).reshape(5, 5, 3)
    with Image.open(tmp_path / write_sample(tmp_path, 3, ImageProcessing(8, 8), pixels)) as image:
        assert (np.asarray(image) == pixels).all()
    name = write_sample(tmp_path, 4, TextProcessing(tokenizer_json(), 8), "line\r\nümlaut")
    assert (tmp_path / name).read_bytes() == "line\r\nümlaut".encode() and name.endswith(".txt")


def test_the_card_says_how_good_it_is_and_by_which_evidence() -> None:
    card = (packed() / "bundle/README.md").read_text(encoding="utf-8")
    evidence = json.loads((packed() / "bundle/evidence/evidence.json").read_text())
    chosen = next(one for one in evidence["candidates"] if one["name"] == evidence["chosen"])
    for part in (f"{chosen['metric']:.4f}", "48 held-out samples", "pipeline verify", "0. a", "| agreement |"):
        assert part in card


def test_the_bundle_names_the_provider_that_its_times_are_of() -> None:
    with open_bundle(packed() / "bundle") as opened:
        assert {one["provider"] for one in opened.manifest["models"].values()} == {"cpu"}
    evidence = {"provider": "cuda", "gpu": "a GPU (compute capability 8.6)"}
    assert on_provider(evidence) == " (by ONNX Runtime's cuda provider on a GPU (compute capability 8.6))"
    gates = [
        {"name": "agreement", "subject": subject, "verdict": "pass", "message": "1 is at least .99"}
        for subject in ("onnx-fp16", "onnx-fp16 on cpu", "onnx-fp32 on cpu")
    ]
    runs = [{"name": f"{name} on cpu", "candidate": name, "provider": "cpu"} for name in ("onnx-fp16", "onnx-fp32")]
    table = gates_table({"gates": gates, "other_runs": runs}, "onnx-fp16")
    assert table.splitlines()[2:] == [
        "| agreement | pass | 1 is at least .99 |",
        "| agreement on cpu | pass | 1 is at least .99 |",
    ]


def test_hostile_names_do_no_harm_to_the_card(tmp_path: Path) -> None:
    assert plain("<img src=x>\n# a | b `c` [d](e)") == (
        "&#60;img src=x&#62; &#35; a &#124; b &#96;c&#96; &#91;d&#93;(e)"
    )
    folder = Path(shutil.copytree(validated()["merge-lora"].folder, tmp_path / "merge-lora"))
    edit_json(folder / "checkpoint/model.json", labels=["<b>bold</b>", "](javascript:x)", "a | b"])
    inputs = validated() | {"merge-lora": artifact_of("merge-lora", folder)}
    Package().run(context_of(tmp_path / "out", inputs), NAME)
    card = (tmp_path / "out/bundle/README.md").read_text()
    assert "<b>" not in card and "](javascript" not in card and "&#60;b&#62;bold" in card


@pytest.mark.parametrize(
    ("backbone", "name"),
    [
        ("tf_efficientnet_lite0", "tf_efficientnet_lite0-image-classification"),
        ("org/model v2/", "model-v2-image-classification"),
        ("../..", "image-classification"),
    ],
)
def test_default_names_are_file_names(backbone: str, name: str) -> None:
    assert default_name(backbone, "image-classification") == name


def test_a_name_that_is_a_path_is_refused() -> None:
    with pytest.raises(ValueError, match="pattern"):
        PackageConfig(name="../elsewhere")


def test_an_example_that_is_a_file_of_the_user_is_packed_not_referred_to(tmp_path: Path) -> None:
    examples = []
    for index, example in enumerate(test_split("image-classification", 6)):
        path = tmp_path / f"{index}.png"
        Image.fromarray(example.content).save(path)  # type: ignore[arg-type]
        examples.append(dataclasses.replace(example, content=path))
    Package().run(context_of(tmp_path / "out", validated(), examples=tuple(examples)), NAME)
    assert str(tmp_path).encode() not in (tmp_path / "out/tiny.tar").read_bytes()
