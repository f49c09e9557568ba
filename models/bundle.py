"""A bundle: a network with everything that runs and proves it, in one folder or tar. Read on the edge.

    bundle.json      schema, task, labels, I/O contract, preprocessing, models, SHA-256 of every other file
    model/           ONNX; `model.onnx` is the chosen one
    engines/         engines for devices, each with its fingerprint, where any were built
    processing/      files of the preprocessing (tokenizer.json), where it needs any
    golden/          raw inputs, the arrays they become, the expected outputs
    evidence/        what validate measured, and its gates
    README.md        model card

Opening a bundle verifies it closed-world: every file has its digest, and there is no other file. The digests
find damage and mix-ups; who made the bundle they cannot say, since `bundle.json` itself is not signed.

Numpy, Pillow, tokenizers, onnxruntime and the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Any

from models.errors import ConfigError, DataError, IntegrityError, RuntimeInferenceError, StageError
from models.spec import IOSpec, side_by_side
from models.tasks import Answer, task_of

if TYPE_CHECKING:
    import numpy as np

    from models.modalities import Content, Processing
    from models.runtimes.onnxruntime_session import OnnxRuntimeSession

BUNDLE_FILE = "bundle.json"
BUNDLE_SCHEMA_VERSION = 2
MODEL_FILE = "model/model.onnx"
ENGINES_FOLDER = "engines"
PROCESSING_FOLDER = "processing"
GOLDEN_FOLDER = "golden"
EVIDENCE_FOLDER = "evidence"
MAX_MANIFEST_BYTES = 64 * 2**20
"""`bundle.json` is read whole before its content can be trusted; a list of labels takes kilobytes."""


PIXEL_TOLERANCE = 2
"""JPEG decoders may round a pixel another way, by a level or two of 255. Another filter is off by tens of levels:
bilinear against bicubic is 0.055 standard deviations on average, and far more at every edge."""

FEATURE_TOLERANCE = 1e-3
"""What another processor's transform, resampler or lossy decoder may round another way in float inputs, whose scale is
about 1: numpy against PyTorch's transform differs by 3e-5. Another resampler is off by .5 in spectrograms of 30
recordings at 8 kHz and by .02 in their waveforms (largest value of each recording, the least of them)."""


@dataclass(frozen=True)
class Check:
    """One thing that `verify` looked at."""

    name: str
    ok: bool
    message: str


@dataclass(frozen=True)
class VerifyReport:
    """All checks; there is no verified bundle without one."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return bool(self.checks) and all(check.ok for check in self.checks)


class Bundle:
    """An opened bundle whose digests hold. A context manager: leaving it removes what a tar was extracted to."""

    def __init__(self, folder: Path, manifest: dict[str, Any], stack: ExitStack | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self._stack = stack or ExitStack()
        self._sessions: dict[tuple[str, int], OnnxRuntimeSession] = {}
        with translated_manifest_errors():
            from models.modalities import processing_from_dict

            self.labels: tuple[str, ...] = tuple(manifest["labels"])
            self.task: str = manifest["task"]
            self.kind = task_of(manifest["task"])
            self.io = IOSpec.from_dict(manifest["io"])
            self.modality: str = manifest["processing"]["kind"]
            self.processing: Processing = processing_from_dict(manifest["processing"], folder / PROCESSING_FOLDER)

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the network and remove the temporary folder, where there is one."""
        self._sessions.clear()
        self._stack.close()

    @property
    def chosen(self) -> str:
        """The name of the candidate in `model/model.onnx`."""
        return str(self.manifest["chosen"])

    @property
    def digest(self) -> str:
        """SHA-256 of `bundle.json`, which holds the digest of every other file: the bundle's identity."""
        return sha256_of(self.folder / BUNDLE_FILE)

    def predict(self, contents: Sequence[Content], threads: int = 2, batch_size: int = 16) -> list[Answer]:
        """Predict raw contents: texts, or encoded images or recordings, their paths, uint8 pixels, waveforms.

        Texts are padded to the longest of their batch, and a dynamically quantized network scales its
        activations by batch: its answers depend a little on `batch_size`.

        Raises:
            DataError: a content cannot be read.
            RuntimeInferenceError: ONNX Runtime failed, or gave other outputs than the contract's.
        """
        predictions: list[Answer] = []
        for start in range(0, len(contents), batch_size):
            arrays = self.processing.arrays(contents[start : start + batch_size])
            predictions += self.kind.answers(self.infer(arrays, threads), self.labels)
        return predictions

    def similarities(self, images: Sequence[Content], texts: Sequence[str], threads: int = 2) -> np.ndarray:
        """Cosines of each image (rows) with each text: float64 (images, texts).

        Raises:
            DataError: the bundle is not of the task image-text, or an image or text cannot be read.
            RuntimeInferenceError: as `predict`.
        """
        import numpy as np

        if self.task != "image-text":
            raise DataError(f"texts are compared with images by the task image-text; this bundle's is {self.task}")
        if not images or not texts:
            return np.zeros((len(images), len(texts)))
        # The network takes pairs; what there is less of is repeated.
        count = max(len(images), len(texts))
        pairs: list[Content] = [(images[i % len(images)], texts[i % len(texts)]) for i in range(count)]  # type: ignore[misc]
        parts = [self.infer(self.processing.arrays(pairs[i : i + 16]), threads) for i in range(0, count, 16)]
        images_, texts_ = np.split(np.concatenate(parts).astype(np.float64), 2, axis=1)
        return np.asarray(images_[: len(images)] @ texts_[: len(texts)].T)

    def infer(self, arrays: Mapping[str, np.ndarray], threads: int = 2, model: str | None = None) -> np.ndarray:
        """Outputs side by side: float32 (batch, width) from preprocessed arrays, with the chosen candidate or
        `model`."""
        outputs_by_name = self._session(model or self.chosen, threads).infer(arrays)
        if set(outputs_by_name) != {output.name for output in self.io.outputs}:
            raise RuntimeInferenceError(
                f"the network gave {sorted(outputs_by_name)}; the bundle's contract names "
                f"{sorted(output.name for output in self.io.outputs)}"
            )
        batch = len(next(iter(arrays.values())))
        for output in self.kind.outputs(self.labels, int(self.io.outputs[0].dims[1])):
            shape = outputs_by_name[output.name].shape
            if shape != (batch, output.dims[1]):
                raise RuntimeInferenceError(f"{output.name} has shape {shape}; expected {(batch, output.dims[1])}")
        return side_by_side({output.name: outputs_by_name[output.name] for output in self.io.outputs})

    def verify(self, threads: int = 2) -> VerifyReport:
        """Digests, preprocessing and outputs of the golden samples, on this device.

        Raises:
            IntegrityError: a golden file cannot be read.
        """
        digests = self._check_digests()
        if not digests.ok:
            return VerifyReport((digests,))
        outputs = [self._check_outputs(name, threads) for name in self.manifest["models"]]
        return VerifyReport((digests, self._check_preprocessing(), *outputs))

    def golden_contents(self) -> list[Content]:
        """The raw golden inputs: texts, encoded images or recordings."""
        with translated_manifest_errors():
            paths = [self.file(sample["file"]) for sample in self.manifest["golden"]["samples"]]
            return [self.processing.from_file(path.read_bytes()) for path in paths]

    def golden_array(self, name: str) -> np.ndarray:
        """`golden/<name>.npy`; pickles are refused.

        Raises:
            IntegrityError: the bundle lists no such file, or it is no array.
        """
        import numpy as np

        path = self.file(f"{GOLDEN_FOLDER}/{name}.npy")
        try:
            array: np.ndarray = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise IntegrityError(f"{path.name} in the bundle is no array: {error}") from error
        return array

    def file(self, name: str) -> Path:
        """The path of a file that `bundle.json` lists. Raises `IntegrityError` where it does not."""
        if name not in self.manifest["files"]:
            raise IntegrityError(f"{BUNDLE_FILE} lists no file {name!r}")
        return self.folder / name

    def _session(self, model: str, threads: int) -> OnnxRuntimeSession:
        """The loaded network; kept until the bundle is closed."""
        from models.runtimes.onnxruntime_session import OnnxRuntimeSession

        if model not in self.manifest["models"]:
            raise IntegrityError(f"the bundle has no model {model!r}, only {', '.join(self.manifest['models'])}")
        if (model, threads) not in self._sessions:
            session = OnnxRuntimeSession(self.file(self.manifest["models"][model]["file"]), threads=threads)
            self._sessions[model, threads] = self._stack.enter_context(session)
        return self._sessions[model, threads]

    def _check_digests(self) -> Check:
        """The files as they are now: they may have changed since the bundle was opened."""
        try:
            verify_folder(self.folder, self.manifest)
        except IntegrityError as error:
            return Check("digests", False, str(error))
        engines = self.manifest.get("engines", [])
        unproven = f"; it does not say that its {len(engines)} engines compute the same" if engines else ""
        count = len(self.manifest["files"])
        return Check("digests", True, f"all {count} files are as recorded, and there is no other{unproven}")

    def _check_preprocessing(self) -> Check:
        """Raw golden inputs must become the recorded arrays: exactly, but for the tolerances of pixels and floats."""
        import numpy as np

        contents = self.golden_contents()
        if not contents:
            return Check("golden preprocessing", False, "the bundle has no golden sample, which is no evidence")
        try:
            arrays = self.processing.arrays(contents)
        except DataError as error:
            return Check("golden preprocessing", False, str(error))
        notes: list[str] = []
        for tensor in self.io.inputs:
            found, wanted = arrays[tensor.name], self.golden_array(tensor.name)
            if found.dtype != wanted.dtype or found.shape != wanted.shape:
                message = f"{tensor.name} is {found.dtype} {found.shape}; recorded {wanted.dtype} {wanted.shape}"
                return Check("golden preprocessing", False, message)
            different = int(np.count_nonzero(found != wanted))
            if different and found.dtype == np.uint8:
                largest = int(np.abs(found.astype(np.int16) - wanted.astype(np.int16)).max())
                notes.append(f"{different} of {found.size} pixel values differ, by {largest} of 255 at most")
                different = different if largest > PIXEL_TOLERANCE else 0
            elif different and found.dtype == np.float32:
                distance = float(np.abs(found - wanted).max())
                notes.append(f"{different} of {found.size} values of {tensor.name} differ, by {distance:.2g} at most")
                different = 0 if distance <= FEATURE_TOLERANCE else different  # NaN is above
            if different:
                detail = notes[-1] if notes else f"{different} of {found.size} values of {tensor.name} differ"
                return Check("golden preprocessing", False, f"{detail}; is a library another version?")
        same = "; ".join(notes) or "exactly"
        return Check("golden preprocessing", True, f"{len(contents)} raw inputs become the recorded arrays: {same}")

    def _check_outputs(self, model: str, threads: int) -> Check:
        """Recorded arrays must give the recorded outputs within the bundle's tolerance."""
        import numpy as np

        name = f"golden outputs of {model}"
        with translated_manifest_errors():
            tolerance = float(self.manifest["models"][model]["golden_tolerance"])
            outputs = self.manifest["models"][model]["golden_outputs"]
        wanted = self.golden_array(outputs)
        inputs = {tensor.name: self.golden_array(tensor.name) for tensor in self.io.inputs}
        try:
            found = self.infer(inputs, threads, model)
        except RuntimeInferenceError as error:
            return Check(name, False, str(error))
        if found.shape != wanted.shape or not wanted.size:
            return Check(name, False, f"shape {found.shape}; recorded {wanted.shape}")
        largest = float(np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max())
        ok = largest <= tolerance  # False for NaN
        relation = "within" if ok else "above"
        return Check(name, ok, f"largest error {largest:.3g}, {relation} the tolerance of {tolerance:.3g}")


# --- opening ----------------------------------------------------------------------------------------


def open_bundle(path: Path) -> Bundle:
    """Open a bundle folder or tar and verify its digests, closed-world. Use it in a `with` block.

    Raises:
        ConfigError: there is nothing at `path`.
        IntegrityError: it is no bundle, or a file differs, is missing, was added or is unsafe.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a bundle's folder or tar")
    with ExitStack() as stack:
        folder = path
        if not path.is_dir():
            if not path.is_file():
                raise IntegrityError(f"{path} is neither a folder nor a plain file")
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="bundle-"))
            folder = extract_tar(path, Path(temporary))
        manifest = read_manifest(folder)
        verify_folder(folder, manifest)
        return Bundle(folder, manifest, stack.pop_all())
    raise AssertionError("unreachable")


def read_manifest(folder: Path) -> dict[str, Any]:
    """`bundle.json` with its shape checked.

    Raises:
        IntegrityError: it is missing, not readable, of another version, or names unsafe paths.
    """
    path = folder / BUNDLE_FILE
    try:
        if path.is_symlink() or path.stat().st_size > MAX_MANIFEST_BYTES:
            raise IntegrityError(f"{path} is a link or larger than {MAX_MANIFEST_BYTES} bytes")
        manifest = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except OSError as error:
        raise IntegrityError(f"{folder} is no bundle: {BUNDLE_FILE} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # also JSON and Unicode errors
        raise IntegrityError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("schema_version") != BUNDLE_SCHEMA_VERSION:
        found = manifest.get("schema_version") if isinstance(manifest, dict) else None
        raise IntegrityError(
            f"{path} has schema version {found}; this program reads {BUNDLE_SCHEMA_VERSION}: use the one that made it"
        )
    with translated_manifest_errors():
        spellings: dict[str, str] = {}
        for name in manifest["files"].keys() | {BUNDLE_FILE}:
            check_name(name)
            check_spelling(name, spellings)
        labels = manifest["labels"]
        if len(labels) < task_of(manifest["task"]).fewest_labels or len(set(labels)) != len(labels):
            raise IntegrityError(f"{path}: the labels are none, too few, or not unique")
        for value in manifest["models"].values():
            if value["file"] not in manifest["files"]:
                raise IntegrityError(f"{path} names the model {value['file']!r}, which is not among its files")
        if manifest["chosen"] not in manifest["models"]:
            raise IntegrityError(f"{path}: the chosen model {manifest['chosen']!r} is not among its models")
    return manifest


def verify_folder(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Every file has its digest, there is no other file, and nothing is a link or a device.

    Raises:
        IntegrityError: says which file.
    """
    recorded: Mapping[str, str] = manifest["files"]
    found = set()
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(root) / name
            mode = path.lstat().st_mode
            relative = path.relative_to(folder).as_posix()
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise IntegrityError(f"{relative} in the bundle is a link or a device; a bundle holds plain files only")
            if stat.S_ISREG(mode):
                found.add(relative)
    if added := sorted(found - recorded.keys() - {BUNDLE_FILE}):
        raise IntegrityError(f"{added[0]} was added to the bundle; {BUNDLE_FILE} does not list it")
    for name, digest in sorted(recorded.items()):
        if name not in found:
            raise IntegrityError(f"{name} is missing from the bundle; get it again")
        if sha256_of(folder / name) != digest:
            raise IntegrityError(f"{name} in the bundle has changed: its SHA-256 is not the recorded one; get it again")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are unique; another reader may take the other of two."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice")
    return value


@contextmanager
def translated_manifest_errors() -> Iterator[None]:
    """What a `bundle.json` of the wrong shape raises becomes an `IntegrityError`."""
    try:
        yield
    except KeyError as error:
        raise IntegrityError(f"{BUNDLE_FILE} lacks the key {error}") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise IntegrityError(f"{BUNDLE_FILE} is not of the expected shape: {error}") from error


# --- tar --------------------------------------------------------------------------------------------


def extract_tar(path: Path, target: Path) -> Path:
    """Extract an uncompressed tar of plain files into the empty folder `target`; return the bundle's folder.

    Python's own filters let links inside the tree pass, and before 3.12 they are off; a bundle needs
    neither links nor modes, so members are written one by one.

    Raises:
        IntegrityError: it is no tar, is cut off, or holds anything but plain files with safe, distinct names.
    """
    try:
        with tarfile.open(path, "r:") as archive:  # "r:" takes no compression, so no decompression bomb
            spellings: dict[str, str] = {}
            room = path.stat().st_size
            for member in archive:
                if member.isdir():
                    check_name(member.name)
                    continue
                if not member.isreg() or member.issparse():
                    raise IntegrityError(f"{path}: {member.name!r} is no plain file (a link, a device or sparse)")
                check_name(member.name)
                check_spelling(member.name, spellings)
                room -= member.size
                if member.size < 0 or room < 0:
                    raise IntegrityError(f"{path}: {member.name!r} claims {member.size} bytes, more than the tar has")
                write_member(archive, member, target)
            check_tail(path, archive.offset)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read as a bundle's tar: {error}; get it again") from error
    except OSError as error:
        raise StageError(f"{path} cannot be unpacked below {target}: {error}") from error
    entries = list(target.iterdir())
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else target


def write_member(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Write one file, with the mode of this process."""
    source = archive.extractfile(member)
    if source is None:
        raise IntegrityError(f"{member.name!r} in the tar has no content")
    destination = target.joinpath(*PurePosixPath(member.name).parts)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with source, destination.open("xb") as stream:
        shutil.copyfileobj(source, stream)
    if destination.stat().st_size != member.size:
        raise IntegrityError(f"the tar is cut off in {member.name!r}; get it again")


def check_tail(path: Path, offset: int) -> None:
    """Nothing may stand behind the end of the archive: tar readers do not look there."""
    with path.open("rb") as stream:
        stream.seek(offset)
        while block := stream.read(2**20):
            if block.strip(b"\0"):
                raise IntegrityError(f"{path}: there are bytes behind the end of the tar")


def check_name(name: object) -> None:
    """A relative POSIX path below the folder, safe on every system.

    Raises:
        IntegrityError: it is absolute, climbs, or has characters that a file system reads otherwise.
    """
    if not isinstance(name, str) or not name:
        raise IntegrityError(f"{name!r} in the bundle is no file name")
    parts = name.split("/")
    unsafe = any(part in ("", ".", "..") or part != part.rstrip(" .") for part in parts)
    if unsafe or any(char in name for char in '\\:*?"<>|') or any(ord(char) < 32 for char in name):
        raise IntegrityError(f"{name!r} in the bundle is an unsafe path; only plain relative paths are allowed")


def check_spelling(name: str, spellings: dict[str, str]) -> None:
    """Names and folders must stay distinct where case and Unicode forms do not count. Adds to `spellings`.

    Raises:
        IntegrityError: the name was there before, or differs from another in case or form only.
    """
    parts = name.split("/")
    for end in range(1, len(parts) + 1):
        is_file = end == len(parts)
        # A folder is kept with a slash behind it, so that no file can share its name.
        spelling = "/".join(parts[:end]) + ("" if is_file else "/")
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", spelling).casefold()).rstrip("/")
        known = spellings.get(folded)
        if known is not None and (is_file or known != spelling):
            raise IntegrityError(f"{name!r} and {known!r} in the bundle are one path on some systems")
        spellings[folded] = spelling
