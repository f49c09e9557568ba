"""The process that builds one engine: `python -P -m models.engines.worker FOLDER`, with the request in the folder.

`tensorrt_rtx` and `tensorrt` have one Python API; what follows is checked against the latter's type stubs. Both are
used as TensorRT 11 wants it: strongly typed networks, no flags of precision, no calibrators.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.engines.build import OUTCOME, OUTPUT, REQUEST

if TYPE_CHECKING:
    import tensorrt as trt

OUT_OF_MEMORY = ("bad_alloc", "OutOfMemory", "out of memory", "Cannot allocate memory")


def main(folder: Path) -> int:
    """Build what `request.json` asks for; writes `outcome.json` whatever becomes of it, unless the process dies."""
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    limit = request["max_memory_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    started = time.monotonic()
    try:
        outcome = build(request, folder / OUTPUT)
    except MemoryError:
        outcome = {"out_of_memory": True}
    outcome["seconds"] = round(time.monotonic() - started, 3)
    outcome["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / OUTCOME).write_text(json.dumps(outcome), encoding="utf-8")
    return 0


def build(request: dict[str, Any], output: Path) -> dict[str, Any]:
    """Parse, then build; what is refused is an outcome, not an error."""
    # The two libraries share one API under two names; only one of them is in this process.
    sys.modules["tensorrt"] = library = import_module(request["library"])
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.ERROR)  # prints; this process's output is a file in the folder
    outcome: dict[str, Any] = {"library_version": library.__version__, "refusals": []}
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["model"]):
        outcome["refusals"] = parser_refusals(logger, request["model"])
    else:
        config = builder.create_builder_config()
        configure(config, request)
        if request["profile"]:
            profile = builder.create_optimization_profile()
            for name, shapes in request["profile"].items():
                profile.set_shape(name, *(tuple(shape) for shape in shapes))
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            outcome["refusals"] = [{"node": "", "operator": "graph", "reason": last_words(output)}]
        else:
            Path(request["engine"]).write_bytes(bytes(plan))
    said = output.read_text(encoding="utf-8", errors="replace")
    if any(word in said for word in OUT_OF_MEMORY):
        outcome["out_of_memory"] = True
    return outcome


def configure(config: trt.IBuilderConfig, request: dict[str, Any]) -> None:
    """TF32 off, so that FP32 is FP32; the GPUs to build for; compatibility where it is asked for."""
    import tensorrt as trt

    config.clear_flag(trt.BuilderFlag.TF32)
    if request["compute_capabilities"]:
        rtx: Any = config  # these two are TensorRT-RTX's alone
        rtx.num_compute_capabilities = len(request["compute_capabilities"])
        for index, name in enumerate(request["compute_capabilities"]):
            rtx.set_compute_capability(getattr(trt, "ComputeCapability").__members__[name], index)  # noqa: B009
        return
    if request["options"]["version_compatible"]:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    level = request["options"]["hardware_compatibility"].replace("-", "_").upper()
    config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.__members__[level]


def parser_refusals(logger: trt.Logger, model: str) -> list[dict[str, str]]:
    """Every node that the parser does not take, by `supports_model_v2`, which does not stop at the first."""
    import tensorrt as trt

    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parser.supports_model_v2(Path(model).read_bytes(), model)
    refusals = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        reason = " ".join(error.desc().split())[:300]
        if reason == "false":  # what it says of an operator that it has no importer for
            reason = "the parser does not know this operator"
        refusals.append({"node": error.node_name(), "operator": error.node_operator(), "reason": reason})
    return refusals or [
        {"node": "", "operator": "graph", "reason": "the parser refuses the graph and does not say why"}
    ]


def last_words(output: Path) -> str:
    """Why the builder gave nothing, in one line: the last error that it printed."""
    lines = [line.split("] ", 2)[-1] for line in output.read_text(errors="replace").splitlines() if "[E]" in line]
    return " ".join(lines[-1].split())[:400] if lines else "the builder gave no engine and does not say why"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
