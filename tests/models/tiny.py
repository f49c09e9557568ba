"""Tiny real networks, images, sounds and tokenizers for the tests of this folder."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from models.backbones.build import LoadedBackbone, build_backbone, measure_feature_dim
from models.checkpoint import save_checkpoint
from models.classifier import Classifier, make_spec, new_classifier
from models.modalities.text import TextProcessing
from models.modalities.vision import ImageProcessing
from models.spec import BackboneSpec, ModelSpec

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "bad", "red", "bird", "stone", "tree", "runs")
BERT = {
    "model_type": "bert", "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 24,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "vocab_size": len(WORDS), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
SQUEEZEBERT = {**BERT, "model_type": "squeezebert", "embedding_size": 16}
T5 = {
    "model_type": "t5", "vocab_size": len(WORDS), "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2,
    "num_heads": 2, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "model_type": "bart", "vocab_size": len(WORDS), "d_model": 16, "encoder_layers": 2, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
    "decoder_start_token_id": 2,
}  # fmt: skip
RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
}  # fmt: skip
VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "image_size": 32, "patch_size": 8,
}  # fmt: skip
WHISPER = {
    "model_type": "whisper", "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 20, "vocab_size": 32,
    "max_source_positions": 100, "max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "init_std": 0.3,  # by default the positions would drown the sound
}  # fmt: skip
WAV2VEC2 = {
    "model_type": "wav2vec2", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "conv_dim": [8, 8, 8], "conv_kernel": [10, 8, 4], "conv_stride": [5, 8, 8],
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "group", "vocab_size": 8,
    "mask_time_length": 2,
}  # fmt: skip
AST = {
    "model_type": "audio-spectrogram-transformer", "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 32, "num_mel_bins": 32, "max_length": 50, "patch_size": 16,
    "frequency_stride": 10, "time_stride": 10,
}  # fmt: skip
AUDIO_RATE = 8_000
"""Of the made-up recordings: not that of the backbones, so that they are resampled everywhere."""
TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS_OF_TOWER = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
PIXELS_OF_TOWER = {"image_size": 32, "patch_size": 8}
DUAL: dict[str, dict[str, Any]] = {
    "clip": {
        "text_config": {**TOWER, **WORDS_OF_TOWER, "max_position_embeddings": 24},
        "vision_config": {**TOWER, **PIXELS_OF_TOWER},
        "projection_dim": 12,
    },
    "siglip": {
        "text_config": {**TOWER, **WORDS_OF_TOWER, "max_position_embeddings": 12, "projection_size": 16},
        "vision_config": {**TOWER, **PIXELS_OF_TOWER},
    },
    "vision-text-dual-encoder": {"text_config": BERT, "vision_config": VIT, "projection_dim": 12},
    "align": {
        "text_config": {**TOWER, **WORDS_OF_TOWER, "max_position_embeddings": 24},
        "vision_config": {"image_size": 32, "width_coefficient": 0.05, "depth_coefficient": 0.2},
        "projection_dim": 16,
    },
}
"""Kinds with both towers."""
TIMM = {
    "library": "timm", "name": "test_efficientnet", "arguments": {}, "mean": [0.5] * 3, "std": [0.5] * 3,
}  # fmt: skip


def tokenizer_json() -> str:
    """A word-level tokenizer that frames every text with [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer.to_str()


def hf_text_folder(folder: Path, dtype: torch.dtype = torch.float32, config: dict[str, Any] = BERT) -> Path:
    """A Hugging Face folder of a tiny network: config.json, model.safetensors and the tokenizer."""
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    values = dict(config)
    network = AutoModel.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).to(dtype)
    network.save_pretrained(folder)
    source = folder / "source.json"
    source.write_text(tokenizer_json(), encoding="utf-8")
    PreTrainedTokenizerFast(tokenizer_file=str(source), pad_token="[PAD]").save_pretrained(folder)
    source.unlink()
    return folder


def hf_dual_folder(folder: Path, kind: str = "clip") -> Path:
    """A Hugging Face folder of a tiny dual encoder of `DUAL`, its logits with a scale and an offset of their own."""
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    network = AutoModel.from_config(AutoConfig.for_model(kind, **DUAL[kind]))
    with torch.no_grad():
        for weight in network.parameters():  # transformers' own are so small that all texts are alike
            weight.normal_(0, 0.3)
        if hasattr(network, "temperature"):
            network.temperature.fill_(math.exp(-3.0))
        else:
            network.logit_scale.fill_(3.0)
        if hasattr(network, "logit_bias"):
            network.logit_bias.fill_(-2.0)
    network.save_pretrained(folder)
    source = folder / "source.json"
    source.write_text(tokenizer_json(), encoding="utf-8")
    PreTrainedTokenizerFast(tokenizer_file=str(source), pad_token="[PAD]").save_pretrained(folder)
    source.unlink()
    declared = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32}
    declared |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(declared), encoding="utf-8")
    return folder


def image_backbone(architecture: dict[str, Any] = TIMM, size: int = 32) -> LoadedBackbone:
    """A backbone with random weights and batch-norm statistics that are not the neutral ones."""
    from models.modalities.vision import ImageProcessing

    torch.manual_seed(0)
    module = build_backbone(architecture)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    processing = ImageProcessing(size, size)
    return LoadedBackbone(module, measure_feature_dim(module, processing), architecture, processing)


def text_backbone(config: dict[str, Any] = BERT) -> LoadedBackbone:
    """A tiny network with random weights."""
    from models.modalities.text import TextProcessing

    torch.manual_seed(0)
    architecture = {"library": "hf", "modality": "text", "config": config}
    module = build_backbone(architecture)
    processing = TextProcessing(tokenizer_json(), 16)
    return LoadedBackbone(module, measure_feature_dim(module, processing), architecture, processing)


def pair_backbone() -> LoadedBackbone:
    """A tiny dual encoder with random weights: the image backbone and the text backbone side by side."""
    from models.backbones.dual import make_dual_module
    from models.modalities.image_text import PairProcessing

    image, text = image_backbone(), text_backbone()
    assert isinstance(image.processing, ImageProcessing) and isinstance(text.processing, TextProcessing)
    widths = image.feature_dim, text.feature_dim
    module = make_dual_module(image.module, text.module, widths)
    architecture = {"library": "dual", "image": image.architecture, "text": text.architecture, "widths": list(widths)}
    processing = PairProcessing(image.processing, text.processing)
    return LoadedBackbone(module, measure_feature_dim(module, processing), architecture, processing)


def audio_backbone(config: dict[str, Any] = WHISPER) -> LoadedBackbone:
    """A tiny audio encoder with random weights that hears half a second."""
    from models.backbones.hf_audio import fitted, make_audio_module, prepare

    torch.manual_seed(0)
    processing = prepare("tiny", config, {}, None if config is AST else 0.5)
    architecture = {"library": "hf", "modality": "audio", "config": fitted(config, processing)}
    module = make_audio_module(architecture["config"])
    return LoadedBackbone(module, measure_feature_dim(module, processing), architecture, processing)


def hf_audio_folder(folder: Path, config: dict[str, Any] = WHISPER, **extractor: Any) -> Path:
    """A Hugging Face folder of a tiny audio network, Whisper with its decoder."""
    from transformers import AutoConfig, AutoModel

    from models.backbones.hf_audio import EXTRACTORS, FORMS

    torch.manual_seed(0)
    values = dict(config)
    kind = values.pop("model_type")
    AutoModel.from_config(AutoConfig.for_model(kind, **values)).save_pretrained(folder)
    declared = {"feature_extractor_type": EXTRACTORS[FORMS[kind]], "sampling_rate": 16_000, **extractor}
    (folder / "preprocessor_config.json").write_text(json.dumps(declared), encoding="utf-8")
    return folder


def recording(label: int, random: np.random.Generator) -> Any:
    """A tone whose pitch tells the label, and noise: at `AUDIO_RATE`, a fifth to seven tenths of a second."""
    from models.modalities.audio import Waveform

    time = np.arange(int(AUDIO_RATE * random.uniform(0.2, 0.7))) / AUDIO_RATE
    tone = 0.3 * np.sin(2 * np.pi * (300, 900, 2000)[label] * time) + 0.05 * random.standard_normal(len(time))
    return Waveform(tone.astype(np.float32), AUDIO_RATE)


def classifier_of(loaded: LoadedBackbone, labels: tuple[str, ...] = ("a", "b", "c")) -> tuple[Classifier, ModelSpec]:
    """A classifier whose head gives logits of a visible size, and its specification."""
    torch.manual_seed(1)
    model = new_classifier(loaded, len(labels))
    nn.init.normal_(model.task_head.weight, std=0.5)
    nn.init.normal_(model.task_head.bias, std=0.1)  # zero, the exporter would store it as one with other zeros
    library = loaded.architecture["library"]
    backbone = BackboneSpec(f"{library}:tiny", library, "tiny", None, None, "random", "0")
    task: Any = f"{loaded.processing.kind}-classification"
    return model.eval(), make_spec(task, backbone, loaded, labels)


def saved_checkpoint(folder: Path, loaded: LoadedBackbone) -> Classifier:
    """Write a checkpoint of a new classifier; the classifier itself in eval mode."""
    model, spec = classifier_of(loaded)
    save_checkpoint(folder, model, spec, loaded.processing)
    return model


def inputs_of(loaded: LoadedBackbone, samples: int = 5) -> tuple[torch.Tensor, ...]:
    """Made-up inputs in the order of the I/O spec."""
    random = np.random.default_rng(0)
    if loaded.processing.kind == "text":
        contents: list[Any] = [" ".join(random.choice(WORDS[4:], 3 + index)) for index in range(samples)]
    elif loaded.processing.kind == "audio":
        contents = [recording(index % 3, random) for index in range(samples)]
    else:
        contents = [random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(samples)]
    arrays = loaded.processing.arrays(contents)
    return tuple(torch.from_numpy(arrays[tensor.name]) for tensor in loaded.processing.inputs)


def logits_of(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Logits without gradients."""
    with torch.inference_mode():
        return model(*inputs).clone()


def png(width: int, height: int, colour: tuple[int, int, int] = (200, 30, 60)) -> bytes:
    """One plain image, encoded."""
    stream = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(stream, "PNG")
    return stream.getvalue()


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level keys of a JSON file."""
    value = json.loads(path.read_text(encoding="utf-8"))
    value.update(changes)
    path.write_text(json.dumps(value), encoding="utf-8")
