"""The one exception tree. Every error carries the exit code the command line ends with.

    PipelineError                 4   something failed
    ├── ConfigError               2   usage or configuration; nothing was run
    ├── MissingCapabilityError    3   this machine lacks a package, a provider or a device
    └── StageError                4   a stage failed
        ├── DataError                 the data cannot be used
        ├── TrainingError             training diverged or ran out of memory
        ├── ModelError                weights or architecture cannot be used (NaN, wrong keys, …)
        ├── MergeError                the adapter could not be folded
        ├── ExportError               the graph could not be exported or is not a valid one
        ├── QuantizeError             the quantizer refused the graph
        ├── EngineError               no engine could be built, or building one ran over a limit
        ├── RuntimeInferenceError     a runtime failed, or is not the one asked for
        └── IntegrityError            a digest differs, or a file is missing or was added

A message says what was found, what was expected and the next thing to try.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class PipelineError(Exception):
    """Base of every error that this project raises on purpose."""

    exit_code = 4
    on_stdout = False
    """Whether `--json` has printed it as part of a record."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration: where it stands, what it is, how to mend it."""

    place: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" + (f" ({self.hint})" if self.hint else "")


class ConfigError(PipelineError):
    """Usage or configuration. Holds all problems found, not only the first."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem] | str) -> None:
        if isinstance(problems, str):
            problems = [Problem("command line", problems)]
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class MissingCapabilityError(PipelineError):
    """This machine lacks something. The message ends with the line that installs it."""

    exit_code = 3


class StageError(PipelineError):
    """A stage failed."""


class DataError(StageError):
    """The data cannot be used as it is."""


class TrainingError(StageError):
    """Training diverged, or could not run."""


class ModelError(StageError):
    """Weights or an architecture cannot be used."""


class MergeError(StageError):
    """The adapter could not be folded into the base weights."""


class ExportError(StageError):
    """The network could not be exported, or the exported graph is not valid."""


class QuantizeError(StageError):
    """The quantizer refused the graph."""


class EngineError(StageError):
    """An engine could not be built, or its build ran over a limit."""


class RuntimeInferenceError(StageError):
    """A runtime failed, or is not the one that was asked for."""


class IntegrityError(StageError):
    """A digest differs from the recorded one, or a file is missing or was added."""
