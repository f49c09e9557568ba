"""Engines of candidates: what export and quantize build where engines are asked for, and how it is written down.

An engine belongs to the ONNX candidate that it is built from: it is never better proven than that one. Most are built
for devices that this machine is not: until a device has run one, it is UNPROVEN.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import Field

from models.engines.build import HardwareLevel, Options, Outcome, build_engine, require_library
from models.engines.check import Finding, check_graph_for, summary
from models.engines.mends import Mended, mend_for
from models.engines.targets import Target, runtime_of, target_of
from models.errors import ConfigError, EngineError, Problem, RuntimeInferenceError
from models.graph import module_of
from models.onnx_files import is_light, load_weights
from models.runtimes.gpu import gpu_here
from stages.artifact import sha256_of_file, write_json
from stages.base import StageConfig, StageContext
from stages.candidates import Candidate

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from models.spec import IOSpec
    from stages.artifact import Artifact

ENGINES_FILE = "engines.json"
ENGINES_FOLDER = "engines"
ENGINE_PACKAGES = ("tensorrt-rtx-cu13", "tensorrt")
"""What builds engines."""

BATCH_PROFILE = (1, 8, 32)
"""Smallest, usual and largest batch that an engine takes, where export.profile says nothing."""

ENGINE_TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
ENGINE_TOLERANCE_INT8 = 5e-2
"""How far an engine, or the mended graph that it is built from, may be from its candidate, as a share of the range of
the outputs: export's ceilings of its precision, and for fewer bits what package allows another device. Where products
became FP16 at least fp16's. Measured of mends on tiny graphs: 0 for biases and middle zero points, 2e-7 for resizes,
2e-4 for products in FP16."""

UNPROVEN = "UNPROVEN"


class EngineBuildConfig(StageConfig):
    """How engines are built."""

    max_seconds: float = Field(default=900, gt=0, description="Limit on the time of one build (seconds).")
    max_memory_bytes: int = Field(
        default=16 * 2**30, ge=2**28, description="Limit on the memory of one build: its address space (bytes)."
    )
    version_compatible: bool = Field(
        default=False, description="Of standard TensorRT: engines that later versions load as well, at some speed."
    )
    hardware_compatibility: HardwareLevel = Field(
        default="none", description="Of standard TensorRT: which other GPUs an engine runs on, at some speed."
    )


@dataclass(frozen=True)
class EngineRequest:
    """What export hands on to every stage that makes candidates. `profile` maps a dynamic axis to its smallest, usual
    and largest size."""

    targets: tuple[str, ...]
    profile: Mapping[str, tuple[int, int, int]]
    build: EngineBuildConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"targets": self.targets, "profile": self.profile, "build": self.build.model_dump(mode="json")}


@dataclass(frozen=True)
class Engine:
    """One engine. `source` is the ONNX file that it is built from: the candidate's own, or a mended copy beside the
    engine; `onnx_sha256` is its digest. `profile` holds the shapes of each input with dynamic axes. What standard
    TensorRT builds for another GPU than the one here is built on the device: then there is no `file` yet."""

    name: str
    candidate: str
    precision: str
    file: str | None
    sha256: str | None
    size_bytes: int | None
    targets: tuple[str, ...]
    runtime: str
    library_version: str | None
    compute_capabilities: tuple[str, ...]
    profile: Mapping[str, Any]
    source: str
    onnx_sha256: str
    mends: tuple[str, ...] = ()
    mended_error: float | None = None
    tolerance: float = ENGINE_TOLERANCE_INT8
    build_seconds: float = field(default=0.0, compare=False)

    @property
    def fingerprint(self) -> str:
        """The JSON file that says what the engine is."""
        return f"{ENGINES_FOLDER}/{self.name}.json"

    @property
    def files(self) -> tuple[str, ...]:
        """All that belongs to it, the ONNX file included."""
        return tuple(name for name in (self.file, self.fingerprint, self.source) if name)


@dataclass(frozen=True)
class LeftOut:
    """Targets that a candidate has no engine for, and why."""

    candidate: str
    targets: tuple[str, ...]
    reason: str
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class EngineReport:
    """What came of the request for the candidates of one stage."""

    engines: tuple[Engine, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    mended: tuple[tuple[str, Mended], ...] = ()

    def notes(self) -> list[str]:
        """For a person."""
        lines = [
            f"engine {one.name}: {size_in_words(one.size_bytes)}, {UNPROVEN}{mends_in_words(one)}"
            for one in self.engines
        ]
        return lines + [
            f"{one.candidate} has no engine for {', '.join(one.targets)}: {one.reason}" for one in self.left_out
        ]

    def summary(self) -> dict[str, Any]:
        """For the manifest and the report."""
        return {
            "engines": [asdict(one) for one in self.engines],
            "engines_left_out": [asdict(one) for one in self.left_out],
            "engine_mends": [{"candidate": name, **one.to_dict()} for name, one in self.mended],
        }


def size_in_words(size_bytes: int | None) -> str:
    """In megabytes, or that it is not built yet."""
    return "to be built on its device" if size_bytes is None else f"{size_bytes / 1e6:.1f} MB"


def mends_in_words(engine: Engine) -> str:
    """What was changed in the graph, and by how much its outputs moved."""
    if not engine.mends:
        return ""
    return f"; {', '.join(engine.mends)}, which moved the outputs by {engine.mended_error:.1e} of their range"


# --- the request --------------------------------------------------------------------------------------


def request_engines(
    targets: Sequence[str],
    profile: Mapping[str, tuple[int, int, int]],
    build: EngineBuildConfig,
    io: IOSpec,
    shapes: Sequence[Mapping[str, np.ndarray]],
) -> EngineRequest:
    """The request, with a size for every dynamic axis: the batch by default, others as long as the shapes tried here.

    Raises:
        ConfigError: `profile` names an axis that the network does not have.
        MissingCapabilityError: a library that a target wants is not installed.
    """
    for name in targets:
        if target_of(name).runtime == "tensorrt-rtx":
            require_library(runtime_of(target_of(name)))
    axes: dict[str, list[int]] = {}
    for arrays in shapes:
        for tensor in io.inputs:
            for index, axis in tensor.dynamic_axes.items():
                axes.setdefault(axis, []).append(int(arrays[tensor.name].shape[index]))
    unknown = [
        Problem(f"export.profile.{axis}", "the network has no such dynamic axis", f"it has {', '.join(axes)}")
        for axis in profile
        if axis not in axes
    ]
    if unknown:
        raise ConfigError(unknown)
    found = {axis: (1, sorted(sizes)[len(sizes) // 2], max(sizes)) for axis, sizes in axes.items()}
    return EngineRequest(tuple(targets), found | {"batch": BATCH_PROFILE} | dict(profile), build)


def asked_engines(export: Artifact) -> EngineRequest | None:
    """The request that export wrote down; None where no engines are asked for."""
    if ENGINES_FILE not in export.manifest["files"]:
        return None
    value = json.loads(export.file(ENGINES_FILE).read_text(encoding="utf-8"))["request"]
    profile = {axis: (sizes[0], sizes[1], sizes[2]) for axis, sizes in value["profile"].items()}
    return EngineRequest(tuple(value["targets"]), profile, EngineBuildConfig.model_validate(value["build"]))


# --- files --------------------------------------------------------------------------------------------


def write_engines(folder: Path, request: EngineRequest, report: EngineReport) -> None:
    """Write `engines.json`."""
    values = [{**asdict(one), "build_seconds": 0.0} for one in report.engines]  # the same bytes each time
    write_json(folder / ENGINES_FILE, {"request": request.to_dict(), "engines": values})


def read_engines(artifact: Artifact) -> tuple[Engine, ...]:
    """The engines of an artifact, none where none were asked for."""
    if ENGINES_FILE not in artifact.manifest["files"]:
        return ()
    items: list[dict[str, Any]] = json.loads(artifact.file(ENGINES_FILE).read_text(encoding="utf-8"))["engines"]
    lists = ("targets", "compute_capabilities", "mends")
    for item in items:
        item.update({key: tuple(item[key]) for key in lists})
    return tuple(Engine(**item) for item in items)


# --- building -----------------------------------------------------------------------------------------


def build_engines(
    context: StageContext,
    request: EngineRequest,
    candidates: Iterable[Candidate],
    inputs: Sequence[Mapping[str, np.ndarray]],
) -> EngineReport:
    """Check every candidate that is accepted, or only does not run here, against every target, mend what can be mended,
    build, and write `engines.json`.

    `inputs` are preprocessed batches: a mended graph must answer them as the candidate does.

    Raises:
        MissingCapabilityError: a library is not installed.
        EngineError: a build ran over a limit, or died.
    """
    folder = context.output / ENGINES_FOLDER
    folder.mkdir()
    parts = []
    there = [candidate for candidate in candidates if candidate.accepted or not candidate.runs_here]
    with context.progress.task("engines", len(there)) as advance:
        for candidate in there:
            parts.append(engines_of(context, request, candidate, inputs))
            advance()
    report = EngineReport(
        tuple(one for part in parts for one in part.engines),
        tuple(one for part in parts for one in part.left_out),
        tuple(one for part in parts for one in part.mended),
    )
    write_engines(context.output, request, report)
    return report


@dataclass(frozen=True)
class Plan:
    """Targets that one engine serves, and the graph that it is built from (None: the candidate's own file)."""

    targets: tuple[Target, ...]
    graph: onnx.ModelProto | None
    mended: tuple[Mended, ...]


def engines_of(
    context: StageContext, request: EngineRequest, candidate: Candidate, inputs: Sequence[Mapping[str, np.ndarray]]
) -> EngineReport:
    """The engines of one candidate."""
    engines, left_out, done = [], [], []
    model = load_graph(context.output / candidate.file)
    plans, refused = plan_engines(model, candidate, request)
    left_out += refused
    for plan in plans:
        built = build_planned(context, request, candidate, model, plan, inputs)
        if isinstance(built, LeftOut):
            left_out.append(built)
        else:
            engines.append(built)
            done += [(candidate.name, one) for one in plan.mended]
    return EngineReport(tuple(engines), tuple(left_out), tuple(done))


def load_graph(path: Path) -> onnx.ModelProto:
    """The graph with every node named; weights in a second file stay there, all but zero points, which targets have
    rules for."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    load_weights(model, path.parent, {name for node in pairs for name in node.input[2:]})
    taken = {node.name for node in model.graph.node}
    for index, node in enumerate(model.graph.node):
        if not node.name:
            node.name = next(name for name in (f"{node.op_type}_{index}", f"unnamed_{index}") if name not in taken)
    return model


def plan_engines(
    model: onnx.ModelProto, candidate: Candidate, request: EngineRequest
) -> tuple[list[Plan], list[LeftOut]]:
    """Which targets share an engine: those for which that costs nothing and that want the same graph."""
    groups: dict[tuple[str, tuple[str, ...]], list[tuple[Target, onnx.ModelProto, list[Mended]]]] = {}
    left_out, light = [], is_light(model)
    for name in request.targets:
        target = target_of(name)
        graph, mended, findings = unmended(model, target) if light else mend_for(model, target)
        if findings:
            left_out.append(LeftOut(candidate.name, (name,), summary(findings), tuple(findings)))
            continue
        key = (f"{target.runtime} {target.shares}", tuple(one.mend for one in mended))
        groups.setdefault(key, []).append((target, graph, mended))
    plans = []
    for members in groups.values():
        _, graph, mended = members[0]
        plans.append(Plan(tuple(one for one, _, _ in members), graph if mended else None, tuple(mended)))
    return plans, left_out


def unmended(model: onnx.ModelProto, target: Target) -> tuple[onnx.ModelProto, list[Mended], list[Finding]]:
    """As `mend_for`, of a graph whose weights lie in a second file: mends read and write them, so none is made."""
    findings = check_graph_for(model, target)
    if any(one.mend for one in findings):
        reason = "its weights are in a second file, where nothing is mended"
        fix = "take a smaller network, or mend the graph by hand"
        findings.insert(0, Finding("", "graph", "", "size", reason, fix))
    return model, [], findings


def build_planned(
    context: StageContext,
    request: EngineRequest,
    candidate: Candidate,
    model: onnx.ModelProto,
    plan: Plan,
    inputs: Sequence[Mapping[str, np.ndarray]],
) -> Engine | LeftOut:
    """One engine with its fingerprint beside it; why not, where the mended graph is off or the library refuses it."""
    import onnx

    targets = tuple(one.name for one in plan.targets)
    name = f"{candidate.name}.{'-'.join(targets)}"
    runtime = runtime_of(plan.targets[0])
    own = context.output / candidate.file
    file = f"{ENGINES_FOLDER}/{name}{runtime.ending}" if builds_here(plan.targets[0]) else None
    source, error = own, None
    if plan.graph is not None:
        source = context.output / ENGINES_FOLDER / f"{name}.onnx"
        onnx.save(plan.graph, source)
        error, problem = mended_error(
            own, source, inputs, context.threads, tolerance_of(candidate.precision, plan.mended)
        )
        if problem:
            source.unlink()
            fixes = "; ".join(dict.fromkeys(one.fix for one in plan.mended))
            reason = f"{', '.join(map(str, plan.mended))}, and {problem}; {fixes}"
            return LeftOut(candidate.name, targets, reason)
    profile = profile_shapes(model, request.profile)
    capabilities = tuple(one.sm for one in plan.targets) if plan.targets[0].runtime == "tensorrt-rtx" else ()
    outcome = None
    if file is not None:
        options = Options(request.build.version_compatible, request.build.hardware_compatibility)
        with TemporaryDirectory(dir=context.resume, prefix="engine-") as scratch:
            outcome = build_engine(
                source, context.output / file, runtime, capabilities, profile, Path(scratch),
                request.build.max_seconds, request.build.max_memory_bytes, options,
            )  # fmt: skip
    if outcome is not None and not outcome.built:
        if plan.graph is not None:
            source.unlink()
        findings = refusals_of(outcome, plan.graph or model)
        return LeftOut(candidate.name, targets, summary(findings), tuple(findings))
    engine = Engine(
        name=name,
        candidate=candidate.name,
        precision=candidate.precision,
        file=file,
        sha256=sha256_of_file(context.output / file) if file else None,
        size_bytes=(context.output / file).stat().st_size if file else None,
        targets=targets,
        runtime=plan.targets[0].runtime,
        library_version=outcome.library_version if outcome else None,
        compute_capabilities=capabilities,
        profile=profile,
        source=source.relative_to(context.output).as_posix(),
        onnx_sha256=sha256_of_file(source),
        mends=tuple(map(str, plan.mended)),
        mended_error=error,
        tolerance=tolerance_of(candidate.precision, plan.mended),
        build_seconds=outcome.seconds if outcome else 0.0,
    )
    fingerprint = asdict(engine)
    del fingerprint["build_seconds"]  # the same inputs give the same bytes
    write_json(context.output / engine.fingerprint, fingerprint)
    return engine


def builds_here(target: Target) -> bool:
    """Whether an engine for a target can be built on this machine: TensorRT-RTX needs no GPU, standard TensorRT needs
    the target's own."""
    if target.runtime == "tensorrt-rtx":
        return True
    if find_spec(runtime_of(target).library) is None:
        return False
    gpu = gpu_here()
    return gpu is not None and gpu.compute_capability == target.compute_capability


def refusals_of(outcome: Outcome, model: onnx.ModelProto) -> list[Finding]:
    """What the library refused, with the module of each node."""
    modules = {node.name: module_of(node) for node in model.graph.node}
    fix = "take another target or precision, or another backbone"
    return [
        Finding(one.node, one.operator, modules.get(one.node, ""), "parser", one.reason, fix)
        for one in outcome.refusals
    ]


def profile_shapes(
    model: onnx.ModelProto, sizes: Mapping[str, tuple[int, int, int]]
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Input → its smallest, usual and largest shape, for inputs with dynamic axes."""
    shapes = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if any(dim.dim_param for dim in dims):
            shapes[value.name] = tuple(
                tuple(sizes[dim.dim_param][which] if dim.dim_param else int(dim.dim_value) for dim in dims)
                for which in range(3)
            )
    return shapes


def tolerance_of(precision: str, mended: Sequence[Mended]) -> float:
    """How far an engine or a mended graph may be from its candidate, as a share of the range of the outputs."""
    tolerance = ENGINE_TOLERANCES.get(precision, ENGINE_TOLERANCE_INT8)
    halved = any(one.mend == "products-in-fp16" for one in mended)
    return max(tolerance, ENGINE_TOLERANCES["fp16"]) if halved else tolerance


def mended_error(
    before: Path, after: Path, inputs: Sequence[Mapping[str, np.ndarray]], threads: int, tolerance: float
) -> tuple[float | None, str]:
    """(largest difference as a share of the range of the outputs, what is wrong with it or nothing)."""
    import numpy as np

    from models.runtimes.onnxruntime_session import OnnxRuntimeSession
    from models.spec import side_by_side

    try:
        with OnnxRuntimeSession(before, threads=threads) as one, OnnxRuntimeSession(after, threads=threads) as other:
            pairs = [(side_by_side(one.infer(arrays)), side_by_side(other.infer(arrays))) for arrays in inputs]
    except RuntimeInferenceError as error:
        return None, f"ONNX Runtime does not run what came of it: {error}"
    if not pairs:
        return None, "there is nothing to compare it on"
    high, low = max(float(old.max()) for old, _ in pairs), min(float(old.min()) for old, _ in pairs)
    moved = max(float(np.abs(new.astype("f8") - old).max()) for old, new in pairs) / max(high - low, 1e-30)
    if not moved <= tolerance:  # also NaN
        return moved, f"its outputs moved by {moved:.2g} of their range; {tolerance:g} is allowed"
    return moved, ""


def require_an_engine(request: EngineRequest, report: EngineReport) -> None:
    """Raises `EngineError` for a target that no candidate has an engine for, with what each was refused for."""
    served = {name for one in report.engines for name in one.targets}
    for target in request.targets:
        if target not in served:
            reasons = [f"{one.candidate}: {one.reason}" for one in report.left_out if target in one.targets]
            raise EngineError(f"no engine can be built for {target}. " + "; ".join(reasons))
