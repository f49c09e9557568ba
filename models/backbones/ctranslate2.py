"""Whisper's encoder from a file of CTranslate2 (https://opennmt.net/CTranslate2), read as bytes; no code of it runs.

The file is a version, the name and revision of its kind, then named arrays, all little-endian: the length of the name
(u16) and the name, the rank (u8), the dimensions (u32 each), the type (u8), the size in bytes (u32) and the values.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from models.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    import torch

VERSION, KIND = 6, "WhisperSpec"
DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
MAX_ARRAYS, MAX_RANK = 100_000, 8
ENCODER = "encoder/"


def read_encoder(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the encoder by their names in the file, without `encoder/`; the others are passed over.

    Raises:
        ModelError: it is no such file, or damaged: a size does not fit a shape, or the file ends too early.
    """
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            (version,), kind = unpack(stream, "I"), read_name(stream)
            if (version, kind) != (VERSION, KIND):
                raise ValueError(f"found {kind[:40]!r} of version {version}, expected {KIND!r} of version {VERSION}")
            _, count = unpack(stream, "II")
            if count > MAX_ARRAYS:
                raise ValueError(f"it claims {count} arrays")
            arrays = [read_array(stream, size) for _ in range(count)]
    except (OSError, ValueError, struct.error) as error:  # also Unicode errors
        raise ModelError(f"{path} is no Whisper model of CTranslate2 that can be read: {error}") from error
    return {name: array for name, array in arrays if array is not None}


def unpack(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    """Little-endian numbers. Raises `ValueError` where the file ends."""
    data = stream.read(struct.calcsize(f"<{form}"))
    if len(data) < struct.calcsize(f"<{form}"):
        raise ValueError("the file ends too early")
    return struct.unpack(f"<{form}", data)


def read_name(stream: BinaryIO) -> str:
    """A name with its length before it."""
    (length,) = unpack(stream, "H")
    return stream.read(length).rstrip(b"\0").decode("utf-8")


def read_array(stream: BinaryIO, size: int) -> tuple[str, np.ndarray | None]:
    """A name and its values, or None where they are not the encoder's. `size` is that of the file."""
    import numpy as np

    name = read_name(stream)
    (rank,) = unpack(stream, "B")
    if rank > MAX_RANK:
        raise ValueError(f"{name[:40]!r} has {rank} axes")
    shape = unpack(stream, "I" * rank)
    code, length = unpack(stream, "BI")
    dtype = np.dtype(DTYPES.get(code, "V0"))
    if length != math.prod(shape) * dtype.itemsize or length > size - stream.tell():
        raise ValueError(f"{name[:40]!r} of shape {shape} and type {code} claims {length} bytes")
    if not name.startswith(ENCODER):
        stream.seek(length, 1)
        return name, None
    return name.removeprefix(ENCODER), np.frombuffer(stream.read(length), dtype).reshape(shape)


def whisper_encoder(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and state (float32) of transformers' `WhisperEncoder`.

    Raises:
        ModelError: as `read_encoder`, or an array is missing or of another shape than its neighbours ask for.
    """
    arrays = read_encoder(path)
    try:
        width, mels, _ = arrays["conv1/weight"].shape
        blocks = len({name.partition("/")[0] for name in arrays if name.startswith("layer_") and name[6].isdigit()})
        config = {
            "model_type": "whisper",
            "d_model": width,
            "num_mel_bins": mels,
            "encoder_layers": blocks,
            "encoder_attention_heads": int(arrays["num_heads"]),
            "encoder_ffn_dim": len(arrays["layer_0/ffn/linear_0/weight"]),
            "max_source_positions": len(arrays["position_encodings/encodings"]),
        }
        return config, state_of(arrays, blocks)
    except (KeyError, ValueError) as error:
        raise ModelError(f"{path} holds no complete encoder of Whisper: {error}") from error


def state_of(arrays: dict[str, np.ndarray], blocks: int) -> dict[str, torch.Tensor]:
    """The arrays under the names of transformers. Raises `KeyError` for one that is missing."""
    import torch

    state: dict[str, torch.Tensor] = {}

    def put(target: str, source: str, names: dict[str, str]) -> None:
        for ours, theirs in names.items():
            state[f"{target}.{ours}"] = torch.from_numpy(arrays[f"{source}/{theirs}"].astype("float32"))

    norm, dense = {"weight": "gamma", "bias": "beta"}, {"weight": "weight", "bias": "bias"}
    put("conv1", "conv1", dense)
    put("conv2", "conv2", dense)
    put("embed_positions", "position_encodings", {"weight": "encodings"})
    put("layer_norm", "layer_norm", norm)
    for index in range(blocks):
        target, source = f"layers.{index}", f"layer_{index}"
        put(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm", norm)
        put(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1", dense)
        put(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm", norm)
        put(f"{target}.fc1", f"{source}/ffn/linear_0", dense)
        put(f"{target}.fc2", f"{source}/ffn/linear_1", dense)
        # One product makes queries, keys and values. Keys have no bias in Whisper: theirs is zero.
        for leaf in ("weight", "bias"):
            joined = torch.from_numpy(arrays[f"{source}/self_attention/linear_0/{leaf}"].astype("float32"))
            for name, part in zip(("q_proj", "k_proj", "v_proj"), joined.chunk(3), strict=True):
                if (name, leaf) != ("k_proj", "bias"):
                    state[f"{target}.self_attn.{name}.{leaf}"] = part.clone()
                elif bool(part.count_nonzero()):
                    raise ValueError(f"{source}: the bias of the keys is not zero")
    return state
