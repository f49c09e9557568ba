"""Image–text retrieval: the task by hand-computed numbers, its head, its preprocessing; two towers as one backbone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models.backbones.build import build_backbone
from models.checkpoint import load_checkpoint, save_checkpoint
from models.classifier import Classifier, PairHead, for_loss, make_spec, new_classifier, set_head
from models.errors import ConfigError, DataError, ModelError
from models.layers import backbone_layers
from models.modalities import processing_from_dict
from models.modalities.image_text import PairProcessing
from models.registry import check_task, load_backbone, resolve
from models.spec import BackboneSpec
from models.tasks.retrieval import TEMPERATURE, Retrieval
from tests.models.tiny import hf_text_folder, image_backbone, logits_of, pair_backbone, png, saved_checkpoint

TASK = Retrieval()
# Three pairs in the plane: the first two find each other, the third image is nearest to the second text.
IMAGES = np.array([[1.0, 0.0], [0.0, 2.0], [0.1, 1.0]], np.float32)
TEXTS = np.array([[3.0, 0.1], [0.0, 1.0], [1.0, 1.0]], np.float32)
OUTPUTS = np.concatenate([IMAGES, TEXTS], axis=1)


def test_scores_count_both_ways_and_equal_texts_as_one() -> None:
    targets = TASK.targets(["one", "two", "three"], 4)
    assert TASK.scores(OUTPUTS, targets).tolist() == [1.0, 1.0, 0.5]  # the third text's nearest image is its own
    found = TASK.more_metrics(OUTPUTS, targets)
    assert found["recall@1 image to text"] == pytest.approx(2 / 3)
    assert found["recall@1 text to image"] == found["recall@5"] == 1.0
    same = TASK.targets(["one", "two", "two"], 4)
    assert TASK.scores(OUTPUTS, same).tolist() == [1.0, 1.0, 1.0]
    constant = TASK.best_constant(targets, 4).repeat(3, axis=0)
    assert TASK.scores(constant, targets).mean() == pytest.approx(1 / 3)
    assert TASK.same(OUTPUTS, OUTPUTS).all() and not TASK.same(OUTPUTS, OUTPUTS[[1, 0, 2]]).all()


def test_the_loss_is_that_of_clip() -> None:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    torch.manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
    targets = torch.arange(6)
    found = TASK.loss(torch.cat([20 * images, texts], dim=1), targets)
    torch.testing.assert_close(found, image_text_contrastive_loss(20 * texts @ images.T))
    # Two pairs with the same text are no negatives of each other.
    twice = torch.cat([20 * images, texts.index_fill(0, torch.tensor([1]), 0) + 0], dim=1)
    twice[1, 4:] = texts[0]
    assert TASK.loss(twice, torch.tensor([0, 0, 2, 3, 4, 5])) != TASK.loss(twice, targets)


def test_the_closed_form_finds_what_both_sides_share() -> None:
    random = np.random.default_rng(0)
    shared = random.standard_normal((240, 5))
    sides = [shared @ random.standard_normal((5, 12)) + 0.3 * random.standard_normal((240, 12)) for _ in range(2)]
    features = np.concatenate([sides[0], np.pad(sides[1][:, :9], ((0, 0), (0, 3)))], axis=1)
    features = (features - features.mean(0)) / np.maximum(features.std(0), 1e-6)
    targets = TASK.targets([str(index) for index in range(240)], 16)
    weight, bias = TASK.fit_head(features[:120], targets[:120], 16, 1000.0, 1e-4)
    assert weight.shape == (16, 24) and not weight[:8, 12:].any() and not weight[8:, :12].any()
    found = features[120:] @ weight.T + bias
    assert TASK.scores(found, targets[120:]).mean() > 0.7
    assert TASK.scores(features[120:], targets[120:]).mean() < 0.2  # sides as they are have nothing in common
    halves = np.split(features[:120] @ weight.T, 2, axis=1)
    scale = np.prod([np.linalg.norm(half, axis=1).mean() for half in halves])
    assert scale == pytest.approx(1 / TEMPERATURE)


def test_what_is_no_text_is_refused() -> None:
    for value in ("", None, " ", 3):
        with pytest.raises(DataError):
            TASK.read(value)
    assert TASK.read("a red bird") == "a red bird"


def made(folder: Path) -> tuple[Classifier, Path]:
    """A network of two tiny towers with a head of visible size, and its checkpoint."""
    loaded = pair_backbone()
    backbone = BackboneSpec("timm:a+hf:b", "dual", "a+b", None, None, "random", "0")
    spec = make_spec("image-text", backbone, loaded, ())
    model = new_classifier(loaded, spec.io.width).eval()
    torch.manual_seed(1)
    set_head(model, torch.randn(spec.io.width, loaded.feature_dim), torch.randn(spec.io.width))
    save_checkpoint(folder, model, spec, loaded.processing)
    return model, folder


def test_a_checkpoint_gives_the_same_embeddings_of_length_one(tmp_path: Path) -> None:
    model, folder = made(tmp_path)
    loaded = load_checkpoint(folder)
    arrays = loaded.processing.arrays([(png(20, 20), "a red bird"), (png(30, 20, (0, 0, 90)), "stone")])
    inputs = tuple(torch.from_numpy(arrays[one.name]) for one in loaded.spec.io.inputs)
    found = logits_of(loaded.model, inputs)
    assert torch.equal(found, logits_of(model, inputs))
    assert [one.name for one in loaded.spec.io.outputs] == ["image_embedding", "text_embedding"]
    for half in found.chunk(2, dim=1):
        torch.testing.assert_close(half.norm(dim=1), torch.ones(2))
    with torch.inference_mode():
        scaled = for_loss(loaded.model, found)
    lengths = [half.norm(dim=1).mean() for half in scaled.chunk(2, dim=1)]
    torch.testing.assert_close(lengths[0] * lengths[1], torch.tensor(1 / TEMPERATURE))


def test_the_head_is_the_linear_map_that_was_fitted(tmp_path: Path) -> None:
    model, _ = made(tmp_path)
    head = model.task_head
    assert isinstance(head, PairHead)
    torch.manual_seed(0)
    width = max(head.image.in_features, head.text.in_features)
    weight, bias, features = torch.randn(256, 2 * width), torch.randn(256), torch.randn(4, 2 * width)
    features[:, head.image.in_features : width] = features[:, width + head.text.in_features :] = 0
    weight[:128, width:] = weight[128:, :width] = 0
    set_head(model, weight, bias)
    halves = (features @ weight.T + bias).chunk(2, dim=1)
    expected = torch.cat([torch.nn.functional.normalize(half, dim=1) for half in halves], dim=1)
    torch.testing.assert_close(head(features), expected)


def test_layers_of_both_towers_go_up_together(tmp_path: Path) -> None:
    model, folder = made(tmp_path)
    processing = load_checkpoint(folder).processing
    arrays = processing.arrays(processing.examples())
    layers = backbone_layers(model, [torch.from_numpy(arrays[one.name]) for one in processing.inputs])
    names = [name for layer in layers for name in layer.parameters]
    assert sorted(names) == sorted(f"backbone.{name}" for name, _ in model.backbone.named_parameters())
    towers = ["text" if ".network.text." in layer.parameters[0] else "image" for layer in layers]
    assert "image" in towers[:2] and towers[-1] == "text" and "image" in towers[-3:]
    text = [layer for layer, tower in zip(layers, towers, strict=True) if tower == "text"]
    assert ".layer.0." in text[-2].parameters[0] and ".layer.1." in text[-1].parameters[0]


def test_a_pair_goes_through_a_file_and_back(tmp_path: Path) -> None:
    processing = pair_backbone().processing
    assert isinstance(processing, PairProcessing)
    pair = (png(20, 30), "a good bird")
    suffix, data = processing.to_file(pair)
    assert suffix == ".json" and processing.from_file(data) == pair
    again = processing_from_dict(processing.save(tmp_path), tmp_path)
    for name, array in processing.arrays([pair]).items():
        np.testing.assert_array_equal(again.arrays([pair])[name], array)
    assert processing.from_argument("photo.png\ta bird") == (Path("photo.png"), "a bird")
    for wrong in (lambda: processing.from_argument("photo.png"), lambda: processing.arrays(["a text"])):
        with pytest.raises(DataError, match="image and a text"):
            wrong()


def test_two_folders_become_one_backbone(tmp_path: Path) -> None:
    alone = image_backbone()
    saved_checkpoint(tmp_path / "image", alone)
    text = hf_text_folder(tmp_path / "text")
    spec = resolve(f"{tmp_path / 'image'}+{text}")
    assert spec.library == "dual" and [part.library for part in spec.parts] == ["timm", "hf"]
    loaded = load_backbone(spec, "image-text", None, 8)
    arrays = loaded.processing.arrays([(png(9, 9), "a red bird"), (png(9, 9), "stone")])
    inputs = [torch.from_numpy(arrays[one.name]) for one in loaded.processing.inputs]
    features = loaded.module.eval()(*inputs).detach()
    other = load_backbone(spec.parts[1], "text-classification", None, 8)
    width = max(alone.feature_dim, other.feature_dim)
    images = load_backbone(spec.parts[0], "image-classification", None, None).module.eval()(inputs[0])
    torch.testing.assert_close(features[:, : alone.feature_dim], images)
    torch.testing.assert_close(features[:, width:][:, : other.feature_dim], other.module.eval()(*inputs[1:]))
    assert build_backbone(loaded.architecture).state_dict().keys() == loaded.module.state_dict().keys()
    (text / "config.json").write_text("{}")
    assert resolve(spec.id).weights_digest != spec.weights_digest


@pytest.mark.parametrize(
    ("backbone", "task", "said"),
    [
        ("timm:resnet18", "image-text", "takes images, the task is image-text.*<image backbone>"),
        ("timm:resnet18+hf:a/b", "image-classification", "takes images and texts"),
        ("timm:resnet18+hf:a/b", "text-classification", "takes images and texts"),
        ("timm:resnet18+timm:resnet18", "image-text", "stands where the text's belongs"),
        ("timm:resnet18+resnet18", "image-text", "no known prefix"),
    ],
)
def test_what_is_no_dual_encoder_is_refused(backbone: str, task: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_task(resolve(backbone), task)  # type: ignore[arg-type]


def test_a_plain_text_folder_is_no_dual_encoder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is one encoder.*<image backbone>"):
        load_backbone(resolve(str(hf_text_folder(tmp_path / "text"))), "image-text", None, None)
