"""A head from the names of the labels: what the text tower of a dual encoder says of them, or a language model beside
an image backbone. Only the image tower and the head ship."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from models.errors import ConfigError, Problem
from models.tasks import of_length_one
from stages.data.splits import DataSplits, Example
from stages.finetune.setup import NAMES, GivenHead, Setup, loss_of_head, outputs_of_head, share_of_unseen

if TYPE_CHECKING:
    import numpy as np

    from models.backbones.build import LoadedBackbone
    from models.classifier import Classifier
    from stages.base import StageContext
    from stages.finetune.config import FinetuneConfig


@dataclass(frozen=True)
class NamedLabels:
    """`text`: what reads the names. `names`: float32 (labels, width), of length 1 where it shares its space with the
    images, whose cosines the logits multiply by `scale`; before a map was fitted, its plain features and None."""

    text: LoadedBackbone
    names: np.ndarray
    scale: float | None


def build_named(context: StageContext, config: FinetuneConfig) -> Setup:
    """The image tower of a dual encoder with the head that its text tower makes of the names; or an image backbone
    that was put together with a language model, whose head follows once its features are known (`with_label_map`).

    Raises:
        ConfigError: there is no text tower, or an unseen label is none.
        ModelError: the backbone cannot be loaded as one.
    """
    from models.backbones.dual import halves_of
    from models.classifier import make_spec, new_classifier
    from models.registry import check_label_names, load_backbone
    from stages.features.label_map import embed_labels

    backbone, known = context.backbone, context.data.labels
    check_label_names(backbone, context.task)
    if twice := [
        one for index, one in enumerate(config.unseen_labels) if one in (*known, *config.unseen_labels[:index])
    ]:
        problem = f"{twice[0]!r} is a label already"
        raise ConfigError([Problem("finetune.unseen_labels", problem, "name only labels without examples, each once")])
    both = load_backbone(backbone, "image-text", config.image_size, config.max_length)
    image, text = halves_of(both)
    labels = (*known, *config.unseen_labels)
    names = embed_labels(text, labels, config.label_templates, context.device)
    spec = make_spec(context.task, backbone.parts[0] if backbone.parts else backbone, image, labels)
    model = new_classifier(image, len(labels))
    named = NamedLabels(text, names, None)
    if both.head is not None:
        named = NamedLabels(text, of_length_one(names), both.architecture["scale"])
        put_names_into_head(model, named, [both.architecture.get("offset", 0.0)] * len(labels))
    return Setup(model, spec, image.processing, context, config, own_head=both.head is not None, named=named)


def put_names_into_head(model: Classifier, named: NamedLabels, offsets: Sequence[float] | np.ndarray) -> None:
    """Logits are the scaled cosines of the features, which have length 1, with the names, plus `offsets` by label."""
    import torch

    from models.classifier import set_head

    assert named.scale is not None
    set_head(model, named.scale * torch.from_numpy(named.names), torch.as_tensor(offsets, dtype=torch.float32))


def with_label_map(setup: Setup) -> Setup:
    """The same setup with a map behind the image backbone to where a language model has the names."""
    import torch

    from models.backbones.build import LoadedBackbone
    from models.backbones.mapped import with_map
    from models.classifier import make_spec, new_classifier
    from stages.features.label_map import fit_label_map

    started = time.monotonic()
    frozen, named, spec = setup.frozen, setup.named, setup.spec
    assert frozen is not None and named is not None
    seen = len(setup.context.data.labels)
    found = fit_label_map(frozen.features["train"], frozen.targets["train"], named.names, seen, setup.task)
    image = LoadedBackbone(setup.model.backbone, spec.feature_dim, spec.architecture, setup.processing)
    mapped = with_map(image, torch.from_numpy(found.weight), torch.from_numpy(found.bias))
    text = with_map(named.text, torch.eye(len(found.centre)), torch.from_numpy(-found.centre))
    named = NamedLabels(text, found.names, found.scale)
    model = new_classifier(mapped, len(spec.labels))
    put_names_into_head(model, named, found.offsets)
    features = of_length_one(frozen.features["validation"] @ found.weight.T + found.bias)
    outputs, targets = outputs_of_head(model, features), frozen.targets["validation"]
    setup = replace(setup, model=model, spec=make_spec(spec.task, spec.backbone, mapped, spec.labels), named=named)
    scores = setup.task.scores(outputs, targets)
    loss = loss_of_head(setup, outputs, targets)
    given = GivenHead("label names", scores, loss, True, share_of_unseen(setup, outputs), found.played)
    setup.context.log.info(
        "%-10s label names: validation %s %.4f; ridge %g, scale %g", "", setup.task.metric, scores.mean(),
        found.regularization, found.scale,
    )  # fmt: skip
    seconds = frozen.seconds + time.monotonic() - started
    return replace(setup, frozen=replace(frozen, given=given, seconds=seconds))


def paired(setup: Setup) -> Setup:
    """Both towers side by side, to be trained on the images with the names of their labels: they keep their
    projections, and of the head only the temperature is learnt."""
    from models.backbones.build import LoadedBackbone
    from models.backbones.dual import make_dual_module
    from models.backbones.hf_dual import own_head
    from models.classifier import make_spec, new_classifier
    from models.modalities.image_text import PairProcessing
    from models.modalities.text import TextProcessing
    from models.modalities.vision import ImageProcessing

    named, images = setup.named, setup.processing
    assert named is not None and isinstance(images, ImageProcessing)
    texts = named.text.processing
    assert isinstance(texts, TextProcessing)
    width = setup.spec.feature_dim
    image, text = copy.deepcopy(setup.model.backbone), copy.deepcopy(named.text.module)
    architecture: dict[str, Any] = {
        "library": "dual", "image": setup.spec.architecture, "text": named.text.architecture, "widths": [width, width],
        "scale": named.scale,
    }  # fmt: skip
    module = make_dual_module(image, text, (width, width))
    loaded = LoadedBackbone(module, 2 * width, architecture, PairProcessing(images, texts), own_head(architecture))
    model = new_classifier(loaded, 2 * width)
    for name, parameter in model.task_head.named_parameters():
        parameter.requires_grad = name == "log_scale"
    spec = make_spec("image-text", setup.spec.backbone, loaded, ())
    context = replace(setup.context, task="image-text", data=captioned(setup))
    return replace(setup, model=model, spec=spec, processing=loaded.processing, context=context)


def captioned(setup: Setup) -> DataSplits:
    """The examples as pairs of an image and the name of its label in one of the templates, in turn; what an example
    should find is a text of the same label."""
    data, templates = setup.context.data, setup.config.label_templates

    def pair(index: int, one: Example) -> Example:
        assert isinstance(one.label, int)
        name = data.labels[one.label]
        content: Any = one.content, templates[index % len(templates)].replace("{}", name)
        return replace(one, content=content, label=name)

    splits = {part: tuple(pair(index, one) for index, one in enumerate(data[part])) for part in NAMES}
    return DataSplits((), {**data.splits, **splits}, data.fingerprints)


def with_tuned_names(network: Classifier, setup: Setup) -> Classifier:
    """The image tower of two that were trained together, with a head of what the other says of the names now."""
    from models.classifier import Classifier, PairHead, make_head
    from stages.features.label_map import embed_labels

    named, head = setup.named, network.task_head
    assert named is not None and named.scale is not None and isinstance(head, PairHead)
    image, text = (network.backbone.get_submodule(f"network.{side}") for side in ("image", "text"))
    scale = head.scale
    encoder, labels = replace(named.text, module=text), setup.spec.labels
    names = embed_labels(encoder, labels, setup.config.label_templates, setup.context.device)
    tuned = Classifier(image, make_head(setup.spec.architecture, setup.spec.feature_dim, len(labels)))
    offsets = setup.model.task_head.get_parameter("bias").detach() * (scale / named.scale)
    put_names_into_head(tuned, NamedLabels(encoder, of_length_one(names), scale), offsets.numpy())
    return tuned.eval()
