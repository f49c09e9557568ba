"""The script of a bundle that proves an engine on its device with `trtexec`, and builds it there where it is not built.

Its flags are those of TensorRT 10 and 11, which differ: 11 knows strongly typed networks only, and has CUDA graphs and
spinning on by default, where 10 has to be asked for them.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from models.engines.receipt import PROOF_DEVICE, PROOF_ENGINE, PROOF_LOG, PROOF_NAME

Shapes = Mapping[str, Sequence[int]]


def proving_script(
    name: str,
    model: str | None,
    engine: str | None,
    profile: Mapping[str, Sequence[Sequence[int]]],
    runs: Mapping[str, tuple[Shapes, Mapping[str, str], Mapping[str, str]]],
    tolerance: float,
) -> str:
    """A POSIX shell script.

    `model` is the bundle's ONNX file to build from, or `engine` the built one. `profile` maps an input to its smallest,
    usual and largest shape. `runs` maps the name of a run to its shapes, and to the bundle's raw files by input and of
    the outputs wanted by output, which may differ by `tolerance` (TensorRT 11 checks that by itself as well).
    """
    lines = [HEAD.format(name=name, quoted=shlex.quote(name), log=PROOF_LOG, proof=PROOF_NAME, device=PROOF_DEVICE)]
    if engine is None:
        assert model is not None
        flags = [f"--{which}Shapes={spelled({one: shapes[i] for one, shapes in profile.items()})}"
                 for i, which in enumerate(("min", "opt", "max")) if profile]  # fmt: skip
        lines.append(BUILD.format(model=model, flags=" ".join(flags), engine=PROOF_ENGINE, log=PROOF_LOG))
    else:
        lines.append(f'cp "$here/{engine}" "$out/{PROOF_ENGINE}"')
    for run, (shapes, inputs, wanted) in runs.items():
        given = ",".join(f"{one}:$here/{file}" for one, file in inputs.items())
        expected = ",".join(f"{one}:$here/{file}" for one, file in wanted.items())
        only = {one: shape for one, shape in shapes.items() if one in profile}
        flag = f"--shapes={spelled(only)} " if only else ""
        lines.append(RUN.format(run=run, shapes=flag, inputs=given, wanted=expected, tolerance=f"{tolerance:.9g}",
                                engine=PROOF_ENGINE, log=PROOF_LOG))  # fmt: skip
    lines.append('echo "next: pipeline verify BUNDLE --proof $out --receipt receipt.json"')
    return "\n".join(lines) + "\n"


def spelled(shapes: Shapes) -> str:
    """As trtexec takes shapes: `image:1x3x224x224,mask:1x8`."""
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


HEAD = """#!/bin/sh
# Proves the engine {name} on this device: runs it on the golden inputs with trtexec.
#   sh {name}.sh OUTPUT_FOLDER
# TRTEXEC names the program (Jetson: /usr/src/tensorrt/bin/trtexec; TensorRT-RTX: tensorrt_rtx).
set -eu
out=${{1:?"name a folder outside of the bundle for what comes out"}}
here=$(cd "$(dirname "$0")/.." && pwd)
trtexec=${{TRTEXEC:-trtexec}}
mkdir -p "$out"
printf '%s\\n' {quoted} > "$out/{proof}"
"$trtexec" --help > "$out/{log}" 2>&1 || true
{{ uname -srm; cat /proc/device-tree/model 2>/dev/null | tr -d '\\000' || true; echo
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || true; }} > "$out/{device}"
major=$(sed -n 's/.*\\[TensorRT[^]]* v\\([0-9]*\\)[0-9][0-9][0-9][0-9]\\].*/\\1/p' "$out/{log}" | head -n 1)
typed= fast=
case "$major" in
  10) typed=--stronglyTyped; fast="--useCudaGraph --useSpinWait" ;;
  1 | 11) ;;
  *) echo "expected trtexec of TensorRT 10 or 11, found version '$major'; set TRTEXEC" >&2; exit 3 ;;
esac
"""

BUILD = """"$trtexec" --onnx="$here/{model}" $typed --noTF32 {flags} --profilingVerbosity=detailed \\
  --saveEngine="$out/{engine}" --skipInference >> "$out/{log}" 2>&1"""

RUN = """set --
if [ "$major" = 11 ]; then
  set -- "--loadRefOutputs={wanted}" --accuracyAlgorithm=lInf --accuracyThreshold={tolerance}
fi
rm -f "$out/{run}.outputs.json" "$out/{run}.times.json"
"$trtexec" --loadEngine="$out/{engine}" {shapes}"--loadInputs={inputs}" $fast "$@" --percentile=50,95,99 \\
  --exportOutput="$out/{run}.outputs.json" --exportTimes="$out/{run}.times.json" >> "$out/{log}" 2>&1 ||
  echo "trtexec was not content with the run {run}: see $out/{log}" >&2"""
