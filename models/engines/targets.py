"""The table of engine targets (targets.yaml): what each device's library takes, and where that is known from."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

TABLE = Path(__file__).with_name("targets.yaml")

RuntimeName = Literal["tensorrt-rtx", "tensorrt"]
MendName = Literal["float-bias", "symmetric", "resize-by-products", "products-in-fp16"]


class Row(BaseModel):
    """Base of every entry: unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineRuntime(Row):
    """A library that builds engines: its module, its distribution, how to install it, the ending of its files."""

    library: str
    distribution: str
    install: str
    ending: str


class Rule(Row):
    """Nodes that a target does not take (the head of targets.yaml says how they are matched), why, and the way out."""

    operators: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    attributes: dict[str, int] = {}
    zero_point: Literal["nonzero"] | None = None
    reason: str
    fix: str
    mend: MendName | None = None
    source: str


class Target(Row):
    """A device and the library on it. `compute_capability` as NVIDIA writes it ("8.6"); `shares` names the targets
    that one engine serves at no cost; `refused` says why nothing is built for a device that is known."""

    name: str
    description: str
    runtime: RuntimeName
    versions: str
    compute_capability: str
    shares: str
    dtypes: tuple[str, ...]
    rules: tuple[str, ...]
    max_opset: int | None = None
    refused: str = ""
    source: str

    @model_validator(mode="before")
    @classmethod
    def named(cls, value: Any) -> Any:
        """`for` is a word of Python."""
        return {("description" if key == "for" else key): one for key, one in value.items()}

    @field_validator("rules", mode="before")
    @classmethod
    def flat(cls, value: Any) -> Any:
        """Rule sets stand in the list as lists."""
        return [name for one in value for name in (one if isinstance(one, list) else [one])]

    @property
    def sm(self) -> str:
        """The compute capability as TensorRT's enumeration writes it: `SM86`."""
        return f"SM{self.compute_capability.replace('.', '')}"


class Table(Row):
    """The whole file; every reference in it leads somewhere."""

    sources: dict[str, str]
    runtimes: dict[RuntimeName, EngineRuntime]
    rules: dict[str, Rule]
    targets: dict[str, Target]

    @model_validator(mode="after")
    def complete(self) -> Table:
        """No rule, source or runtime is named that is not there."""
        for target in self.targets.values():
            missing = set(target.rules) - self.rules.keys() or {target.source} - self.sources.keys()
            if missing or target.runtime not in self.runtimes:
                raise ValueError(f"{target.name} names {missing or target.runtime}, which targets.yaml does not have")
        unknown = {rule.source for rule in self.rules.values()} - self.sources.keys()
        if unknown:
            raise ValueError(f"rules name the sources {unknown}, which targets.yaml does not have")
        return self


@cache
def table() -> Table:
    """targets.yaml, read once."""
    import yaml

    values = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    values.pop("rule_sets")
    for name, target in values["targets"].items():
        target["name"] = name
    return Table.model_validate(values)


def target_of(name: str) -> Target:
    """The target of this name.

    Raises:
        ValueError: there is none (the nearest names are given), or nothing is built for it.
    """
    targets = table().targets
    if name not in targets:
        near = difflib.get_close_matches(name, targets, 3, 0.5)
        known = ", ".join(name for name, one in targets.items() if not one.refused)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"there is no target {name!r}; {hint}known: {known}")
    if targets[name].refused:
        raise ValueError(f"nothing is built for {name}: {targets[name].refused}")
    return targets[name]


def runtime_of(target: Target) -> EngineRuntime:
    """The library that builds for a target."""
    return table().runtimes[target.runtime]


def rules_of(target: Target) -> dict[str, Rule]:
    """Name → rule, of a target."""
    return {name: table().rules[name] for name in target.rules}
