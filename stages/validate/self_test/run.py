"""Each defect put into the model, run on the same test samples, and judged as a candidate would be."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from models.errors import RuntimeInferenceError
from stages.gate import Gate, GateResult
from stages.validate.gates import settled
from stages.validate.judge import Judge
from stages.validate.metrics import Outputs, collect_outputs
from stages.validate.self_test.subject import OUTSIDE, NotLoadedError

if TYPE_CHECKING:
    import numpy as np

    from models.checkpoint import Checkpoint
    from models.modalities import Processing
    from models.runtimes.base import Runtime
    from stages.base import Progress
    from stages.data.splits import Example
    from stages.validate.self_test.subject import Arrays, Defect, Mutant, Subject

PROBE_SAMPLES = 8
"""Whose activations say how wide a range is."""

COUNTED = ("caught", "escaped")

STOPPED = "it does not run"
"""Where a gate is named: validate ends with an error, and ships nothing."""


Collect = Callable[["Mutant", "SelfTest", str], Outputs]
"""Mutant, setup and what is shown of it → what it makes of the samples; raises `RuntimeInferenceError`."""


@dataclass(frozen=True)
class SelfTest:
    """What the mutants are made of and run on. `model` is the FP32 candidate's file, `precisions` those that there are
    candidates of."""

    model: Path
    checkpoint: Checkpoint
    examples: Sequence[Example]
    precisions: tuple[str, ...]
    batch_size: int
    threads: int
    progress: Progress


def run_self_test(setup: SelfTest, judge: Judge, collect: Collect | None = None) -> dict[str, Any]:
    """The table of defects and controls, and what the gates made of them; plain values. `collect` gives the outputs of
    a mutant, `outputs_of` where none is named.

    A defect is caught where a gate stops it in every precision it is judged as: one that the configuration lets through
    does not. A gate that says the same of a control is not counted. One that moves no output by more than the controls
    do is equivalent, and not counted either. What is defective outside the candidates (`OUTSIDE`) is counted apart.

    Raises:
        RuntimeInferenceError: the unchanged graph does not run.
    """
    from stages.validate.self_test.defects import CONTROLS, DEFECTS
    from stages.validate.self_test.subject import Mutant

    started, collect = time.monotonic(), collect or outputs_of
    whole = collect(Mutant(), setup, "self-test: unchanged")
    if whole.values is None:
        return {"problem": whole.problem, "samples": len(setup.examples), "defects": [], "controls": []}
    subject = subject_of(setup, judge)
    controls = [tested(one, subject, setup, judge, collect, whole, 0.0, {}, f"control: {one.name}") for one in CONTROLS]
    noise = max((one["moved"] for one in controls if one["moved"] is not None), default=0.0)
    red = {name: {tuple(said) for one in controls for said in one["said"].get(name, ())} for name in setup.precisions}
    rows = [
        tested(one, subject, setup, judge, collect, whole, noise, red, f"self-test {place}/{len(DEFECTS)}: {one.name}")
        for place, one in enumerate(DEFECTS, 1)
    ]
    applied = [one for one in rows if one["status"] in COUNTED]
    outside = [one["status"] == "caught" for one in applied if one["place"] in OUTSIDE]
    counted = [one for one in applied if one["place"] not in OUTSIDE]
    caught = sum(one["status"] == "caught" for one in counted)
    return {
        "problem": "",
        "samples": len(setup.examples),
        "precisions": list(setup.precisions),
        "defects": rows,
        "controls": controls,
        "noise": noise,
        "caught": caught,
        "counted": len(counted),
        "outside": [sum(outside), len(outside)],
        "score": caught / len(counted) if counted else None,
        "by_precision": {
            name: [sum(bool(gates) for gates in judged), len(judged)]
            for name in setup.precisions
            if (judged := [one["judged"][name] for one in counted if name in one["judged"]])
        },
        "false_alarms": sum(one["status"] == "caught" for one in controls),
        "seconds": round(time.monotonic() - started, 1),
    }


def subject_of(setup: SelfTest, judge: Judge) -> Subject:
    """What defects are put into."""
    import numpy as np
    import onnx

    from stages.validate.self_test.subject import Subject

    contents = [one.content for one in setup.examples[:PROBE_SAMPLES]]
    inputs = setup.checkpoint.processing.arrays(contents)
    values = judge.reference.values
    spread = float(np.std(values)) if values is not None else 1.0
    return Subject(onnx.load(str(setup.model)), setup.checkpoint, inputs, spread, setup.threads)


def tested(
    defect: Defect,
    subject: Subject,
    setup: SelfTest,
    judge: Judge,
    collect: Collect,
    whole: Outputs,
    noise: float,
    red: Mapping[str, set[tuple[str, str]]],
    description: str,
) -> dict[str, Any]:
    """A defect's row. `noise` is how far harmless changes move outputs, `red` by precision the (gate, verdict) that no
    credit is given for, empty for a control itself, which is caught where a gate says fail or error. `moved` is the
    largest change of any output, None where there are none to compare; `said` are the verdicts that stop a run. Waivers
    hold for the bytes of a candidate, and so for no mutant."""
    row: dict[str, Any] = {
        **defect.summary(), "judged": {}, "said": {}, "moved": None, "reason": "", "numbers": {},
    }  # fmt: skip
    precisions = [defect.precision] if defect.precision else list(setup.precisions)
    if not set(precisions) <= set(setup.precisions):
        return row | {"status": "not applicable", "reason": f"there is no {defect.precision} candidate"}
    mutant = defect.make(subject)
    if isinstance(mutant, str):
        return row | {"status": "not applicable", "reason": mutant}
    try:
        outputs = collect(mutant, setup, description)
    except RuntimeInferenceError as error:
        reason = str(error).partition("\n")[0][:300]
        if isinstance(error, NotLoadedError) and not defect.refused:
            return row | {"status": "not applicable", "reason": f"the mutant does not load: {reason}"}
        return row | {"status": "caught", "judged": {name: [STOPPED] for name in precisions}, "reason": reason}
    row["moved"] = moved = largest_change(outputs, whole)
    if moved is not None and moved <= noise and red:  # controls are judged whatever they move
        return row | {"status": "equivalent", "reason": "no output moves by more than harmless changes move it"}
    numbers = judge.numbers(outputs)
    row["numbers"] = {key: numbers[key] for key in SHOWN}
    said = {
        name: [
            (one.name, one.verdict)
            for one in settled(judge.verdicts(defect.name, name, numbers), judge.config, None)
            if one.stops and (one.name, one.verdict) not in red.get(name, ())
        ]
        for name in precisions
    }
    row["said"] = {name: [list(one) for one in verdicts] for name, verdicts in said.items()}
    row["judged"] = {name: list(dict.fromkeys(gate for gate, _ in verdicts)) for name, verdicts in said.items()}
    if red:
        caught = all(said.values())
    else:
        caught = any(verdict in ("fail", "error") for verdicts in said.values() for _, verdict in verdicts)
    return row | {"status": "caught" if caught else "escaped", "reason": outputs.problem}


SHOWN = ("relative_error", "sqnr_db", "agreement", "metric_difference", "kl")


def largest_change(outputs: Outputs, whole: Outputs) -> float | None:
    """Between two arrays of one shape; None where either is no evidence."""
    import numpy as np

    if outputs.values is None or whole.values is None or outputs.values.shape != whole.values.shape:
        return None
    return float(np.abs(outputs.values - whole.values).max())


def outputs_of(mutant: Mutant, setup: SelfTest, description: str) -> Outputs:
    """What a mutant makes of the samples, collected as a candidate's outputs are.

    Raises:
        NotLoadedError: it cannot be loaded.
        RuntimeInferenceError: it failed.
    """
    processing, examples, batch_size = given(mutant, setup)
    with opened(mutant, setup) as runtime:
        io, progress = setup.checkpoint.spec.io, setup.progress
        return collect_outputs(runtime, processing, examples, io, batch_size, progress, description)


def given(mutant: Mutant, setup: SelfTest) -> tuple[Processing, Sequence[Example], int]:
    """What a mutant's arrays are made with and of, and how many samples at a time."""
    batch_size = max(1, setup.batch_size // 2) if mutant.halved_batch else setup.batch_size
    return mutant.processing or setup.checkpoint.processing, changed_examples(mutant, setup.examples), batch_size


@contextmanager
def opened(mutant: Mutant, setup: SelfTest) -> Iterator[Runtime]:
    """What runs a mutant.

    Raises:
        NotLoadedError: it cannot be loaded.
    """
    from models.onnx_files import save_graph
    from models.runtimes.onnxruntime_session import OnnxRuntimeSession
    from models.runtimes.torch_eager import TorchEager

    folder: AbstractContextManager[str | None] = nullcontext()
    if mutant.model is not None:
        folder = tempfile.TemporaryDirectory(prefix="mutant-")
    with folder as scratch:
        runtime: Runtime
        if mutant.network is not None:
            runtime = TorchEager(mutant.network, setup.checkpoint.spec.io, "cpu", setup.threads)
        else:
            path = setup.model
            if mutant.model is not None and scratch is not None:
                path = Path(scratch) / "mutant.onnx"
                save_graph(mutant.model, path)
            runtime = OnnxRuntimeSession(path, threads=setup.threads, optimization=mutant.optimization)
        if mutant.inputs is not None:
            runtime = Before(runtime, mutant)
        with ExitStack() as stack:
            yield loaded(runtime, stack)


def loaded(runtime: Runtime, stack: ExitStack) -> Runtime:
    """The runtime, open until the stack closes.

    Raises:
        NotLoadedError: it does not open.
    """
    try:
        return stack.enter_context(runtime)
    except RuntimeInferenceError as error:
        raise NotLoadedError(str(error)) from error


def changed_examples(mutant: Mutant, examples: Sequence[Example]) -> Sequence[Example]:
    """The examples as a mutant is given them, in its order."""
    if mutant.content is not None:
        examples = [replace(one, content=mutant.content(one.content)) for one in examples]
    return [*examples[mutant.shift :], *examples[: mutant.shift]]


class Before:
    """A runtime whose inputs a mutant changes first."""

    def __init__(self, runtime: Runtime, mutant: Mutant) -> None:
        self.runtime = runtime
        self.mutant = mutant

    def __enter__(self) -> Before:
        self.runtime.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runtime.__exit__(kind, error, trace)

    def infer(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """See `models.runtimes.base.Runtime`."""
        assert self.mutant.inputs is not None
        return self.runtime.infer(self.mutant.inputs(inputs))


def self_test_gates(found: dict[str, Any] | None, least: float | None) -> list[GateResult]:
    """The share that must be caught, where one is asked for; then no control may be red either."""
    if least is None or found is None:
        return []
    score = Gate("mutation score", "at least", least, "of the injected defects")
    alarms = Gate("false alarms of the gates", "at most", 0.0, "controls")
    escaped = [one["name"] for one in found["defects"] if one["status"] == "escaped" and one["place"] not in OUTSIDE]
    detail = found["problem"] or (f"not caught: {', '.join(escaped)}" if escaped else "")
    return [
        score.check("self-test", found.get("score"), found.get("counted", 0), detail),
        alarms.check("self-test", found.get("false_alarms"), len(found["controls"]), found["problem"]),
    ]


def self_test_notes(found: dict[str, Any]) -> list[str]:
    """The table in lines, for a person."""
    if found["problem"]:
        return [f"self-test: {found['problem']}"]
    seen, differ = found["outside"]
    lines = [
        f"self-test: {found['caught']} of {found['counted']} injected defects caught on {found['samples']} samples, "
        f"{found['false_alarms']} of {len(found['controls'])} controls red, in {found['seconds']} s",
        f"self-test: of {differ} ways in which a device may prepare its inputs otherwise, {seen} would be seen",
    ]
    for one in found["defects"]:
        if one["status"] == "escaped":
            where = ", ".join(name for name, gates in one["judged"].items() if not gates)
            word = "would not be seen" if one["place"] in OUTSIDE else "not caught"
            lines.append(f"self-test: {word} as {where}: {one['name']} ({one['what']})")
    for one in found["controls"]:
        if one["status"] == "caught":
            gates = sorted({gate for red in one["judged"].values() for gate in red})
            lines.append(f"self-test: control {one['name']} is red: {', '.join(gates)}")
    return lines
