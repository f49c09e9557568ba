"""Hugging Face audio encoders as feature extractors: a clip of fixed length in, pooled features out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.backbones.ctranslate2 import whisper_encoder
from models.backbones.packaged import find_packaged
from models.errors import ModelError
from models.modalities.audio import HOP, WINDOW, AudioProcessing, Form, frames_of

if TYPE_CHECKING:
    import torch

    from models.spec import BackboneSpec

FORMS: dict[str, Form] = {
    "whisper": "log-mel",
    "audio-spectrogram-transformer": "fbank",
    **dict.fromkeys(
        ("wav2vec2", "wav2vec2-conformer", "hubert", "wavlm", "data2vec-audio", "unispeech", "unispeech-sat", "sew"),
        "waveform",
    ),
}
"""Type in config.json → what the encoder hears."""

EXTRACTORS: dict[Form, str] = {
    "log-mel": "WhisperFeatureExtractor", "fbank": "ASTFeatureExtractor", "waveform": "Wav2Vec2FeatureExtractor",
}  # fmt: skip
"""Form → the class in transformers whose arrays ours equal."""

MAX_SECONDS = 10.0
"""Default length of a clip."""
POSITIONS_PER_SECOND = 50
"""Whisper's encoder has a position for every two steps of its spectrogram."""
SPECTROGRAM_RATE = 16_000


# --- modules -----------------------------------------------------------------------------------------


def make_audio_module(config: dict[str, Any]) -> torch.nn.Module:
    """An audio encoder and its pooling. `forward` takes the inputs of `AudioProcessing` in its form, and gives float32
    (batch, features).

    Raises:
        ModelError: the type is not known here, or cannot be built.
    """
    makers: dict[Form, Callable[[dict[str, Any]], torch.nn.Module]] = {
        "log-mel": make_whisper, "fbank": make_spectrogram_transformer, "waveform": make_waveform_encoder,
    }  # fmt: skip
    return makers[form_of(config)](config)


def form_of(config: dict[str, Any]) -> Form:
    """What the encoder hears. Raises `ModelError` for a type that is not known here."""
    kind = config.get("model_type")
    if kind not in FORMS:
        raise ModelError(f"{kind!r} is no audio encoder that is known here; known are {', '.join(FORMS)}")
    return FORMS[kind]


def make_whisper(config: dict[str, Any]) -> torch.nn.Module:
    """The encoder of Whisper alone; the mean of all its states, silence included, as in transformers' classifier."""
    import torch

    class WhisperBackbone(torch.nn.Module):
        network: Any

        def __init__(self) -> None:
            super().__init__()
            self.network = whisper_from_config(config)

        def forward(self, log_mel: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.network(log_mel.to(self.network.dtype)).last_hidden_state.mean(dim=1)
            return features

    return WhisperBackbone()


def whisper_from_config(config: dict[str, Any]) -> torch.nn.Module:
    """`WhisperEncoder` with random weights; its sinusoidal positions are what they are. Raises `ModelError`."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder, sinusoids

    from models.backbones.from_hf import refuse_own_code

    refuse_own_code(config, "the configuration")
    values = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype", "model_type")}
    try:
        network = WhisperEncoder(WhisperConfig(**values))
        positions = network.embed_positions.weight
        positions.data.copy_(sinusoids(*positions.shape))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"transformers cannot build the encoder of Whisper: {error}") from error
    encoder: torch.nn.Module = network.float()
    return encoder


def make_spectrogram_transformer(config: dict[str, Any]) -> torch.nn.Module:
    """The Audio Spectrogram Transformer with its own pooling: the mean of its two special tokens."""
    import torch

    from models.backbones.from_hf import network_from_config

    class SpectrogramBackbone(torch.nn.Module):
        network: Any

        def __init__(self) -> None:
            super().__init__()
            self.network = network_from_config(config)

        def forward(self, fbank: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.network(fbank.to(self.network.dtype)).pooler_output
            return features

    return SpectrogramBackbone()


def make_waveform_encoder(config: dict[str, Any]) -> torch.nn.Module:
    """wav2vec 2.0 and its kin; the mean of the states that belong to the recording, not to the zeros behind it.

    Those whose convolutions have layer norms were trained with a mask, those with a group norm without one
    (transformers' documentation of `Wav2Vec2FeatureExtractor`).
    """
    import torch

    from models.backbones.from_hf import network_from_config

    if config.get("add_adapter"):
        raise ModelError("the encoder has an adapter that shortens its states (add_adapter), which is not known here")
    masked = config.get("feat_extract_norm") == "layer"

    class WaveformBackbone(torch.nn.Module):
        network: Any

        def __init__(self) -> None:
            super().__init__()
            self.network = network_from_config(config)

        def forward(self, waveform: torch.Tensor, valid_samples: torch.Tensor) -> torch.Tensor:
            mask = None
            if masked:
                mask = (torch.arange(waveform.shape[1], device=waveform.device) < valid_samples[:, None]).long()
            hidden: torch.Tensor = self.network(waveform.to(self.network.dtype), attention_mask=mask).last_hidden_state
            states = valid_samples
            for kernel, stride in zip(config["conv_kernel"], config["conv_stride"], strict=True):
                states = (states - kernel) // stride + 1
            places = torch.arange(hidden.shape[1], device=hidden.device)
            weights = (places < states.clamp(min=1)[:, None]).unsqueeze(-1).to(hidden.dtype)
            pooled: torch.Tensor = (hidden * weights).sum(1) / weights.sum(1)
            return pooled

    return WaveformBackbone()


# --- loading -----------------------------------------------------------------------------------------


def load_audio(
    spec: BackboneSpec, source: str, revision: str | None, max_seconds: float | None, pretrained: bool
) -> tuple[torch.nn.Module, dict[str, Any], AudioProcessing]:
    """The module, the architecture that rebuilds it, and its preprocessing.

    Raises:
        ModelError: the encoder, its preprocessing or the length of a clip is none that can be used.
    """
    packaged = find_packaged(spec.id)
    if packaged and packaged[0].layout == "ctranslate2":
        values, state = whisper_encoder(packaged[1])
        processing = prepare(spec.id, values, {}, max_seconds)
        module = make_audio_module(fitted(values, processing))
        if pretrained:
            load_state(module, state, spec.id)
    else:
        from transformers import AutoConfig

        from models.backbones.from_hf import load_weights, refuse_own_code

        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        values = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
        refuse_own_code(values, spec.id)
        processing = prepare(spec.id, values, extractor_values(source, revision), max_seconds)
        module = make_audio_module(fitted(values, processing))
        if pretrained and processing.form == "log-mel":
            load_state(module, encoder_state(source, revision, config), spec.id)
        elif pretrained:
            load_weights(module, source, revision, config)
    return module, {"library": "hf", "modality": "audio", "config": fitted(values, processing)}, processing


def fitted(config: dict[str, Any], processing: AudioProcessing) -> dict[str, Any]:
    """The configuration with as many of Whisper's positions as the clip has; the others take any length, or one."""
    if processing.form != "log-mel":
        return config
    return {**config, "max_source_positions": processing.samples // HOP // 2}


def encoder_state(source: str, revision: str | None, config: Any) -> dict[str, torch.Tensor]:
    """The weights of Whisper's encoder. Raises `ModelError` where the file lacks some."""
    import torch
    import transformers

    from models.backbones.from_hf import check_complete

    kind: Any = transformers.WhisperModel  # whose stub knows neither the report nor that a revision may be None
    pretrained, report = kind.from_pretrained(
        source, revision=revision, config=config, trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
        output_loading_info=True,
    )  # fmt: skip
    state: dict[str, torch.Tensor] = pretrained.get_encoder().state_dict()
    check_complete(source, {f"encoder.{name}" for name in state}, report)
    return state


def load_state(module: torch.nn.Module, state: dict[str, torch.Tensor], name: str) -> None:
    """Copy Whisper's weights, and of its positions those that the clip has. Raises `ModelError` where they differ."""
    network: Any = module.get_submodule("network")
    rows = network.embed_positions.num_embeddings
    positions = state["embed_positions.weight"][:rows]
    try:
        network.load_state_dict({**state, "embed_positions.weight": positions}, strict=True)
    except RuntimeError as error:
        raise ModelError(f"the weights of {name} do not fit an encoder of Whisper: {error}") from error


def extractor_values(source: str, revision: str | None) -> dict[str, Any]:
    """`preprocessor_config.json` of a folder or repository; empty where there is none. Raises `ModelError`."""
    from transformers.utils.hub import cached_file

    file = "preprocessor_config.json"
    found = Path(source) / file
    if not Path(source).is_dir():
        cached = cached_file(source, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        found = Path(str(cached))
    if not found.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{found} is no JSON: {error}; download it again") from error
    return values


def prepare(name: str, config: dict[str, Any], extractor: dict[str, Any], max_seconds: float | None) -> AudioProcessing:
    """The preprocessing of a backbone, from its own configuration; transformers' defaults where that says nothing.

    Raises:
        ModelError: it has another feature extractor than its kind, or the clip is longer than it takes.
    """
    form = form_of(config)
    wanted, found = EXTRACTORS[form], extractor.get("feature_extractor_type", EXTRACTORS[form])
    if found != wanted:
        raise ModelError(f"{name} asks for the preprocessing of {found}; expected {wanted}, the only one known for it")
    rate = int(extractor.get("sampling_rate", SPECTROGRAM_RATE))
    if form == "waveform":
        samples = round((max_seconds or MAX_SECONDS) * rate)
        return AudioProcessing(rate, samples, form, normalize=bool(extractor.get("do_normalize", True)))
    if rate != SPECTROGRAM_RATE:
        raise ModelError(f"{name} takes sound at {rate} Hz; spectrograms are known here at {SPECTROGRAM_RATE} Hz only")
    if form == "log-mel":
        return whisper_preparation(name, config, extractor, max_seconds)
    frames = int(config["max_length"])
    samples = (frames - 1) * HOP + WINDOW
    if max_seconds is not None and frames_of(round(max_seconds * rate)) != frames:
        raise ModelError(
            f"{name} takes clips of {samples / rate:.3f} s, finetune.max_seconds is {max_seconds:g}; leave it out"
        )
    normalize = bool(extractor.get("do_normalize", True))
    mean, std = float(extractor.get("mean", -4.2677393)), float(extractor.get("std", 4.5689974))
    return AudioProcessing(
        rate, samples, form, int(config["num_mel_bins"]), normalize, *((mean, std) if normalize else (0.0, 0.5))
    )


def whisper_preparation(
    name: str, config: dict[str, Any], extractor: dict[str, Any], max_seconds: float | None
) -> AudioProcessing:
    """A whole number of positions, as many as `max_seconds` has. Raises `ModelError`."""
    found = extractor.get("n_fft", WINDOW), extractor.get("hop_length", HOP)
    if found != (WINDOW, HOP):
        raise ModelError(f"{name} has a window and step of {found} samples; known here are {(WINDOW, HOP)}")
    longest = int(config["max_source_positions"])
    positions = round((max_seconds or min(MAX_SECONDS, longest / POSITIONS_PER_SECOND)) * POSITIONS_PER_SECOND)
    if not 1 <= positions <= longest:
        raise ModelError(
            f"{name} takes {longest / POSITIONS_PER_SECOND:g} s at most and 0.02 s at least, finetune.max_seconds is "
            f"{max_seconds:g}"
        )
    return AudioProcessing(SPECTROGRAM_RATE, positions * 2 * HOP, "log-mel", int(config["num_mel_bins"]))
