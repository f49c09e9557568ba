"""`pipeline.yaml`: the stage configurations composed, read with every mistake listed at once.

A mistake is a `Problem` with its place (file, line, key) and the nearest known key or value.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from models.errors import ConfigError, DataError, Problem
from models.registry import check_label_names, check_task, resolve
from models.spec import BackboneSpec, TaskName
from models.tasks import FEATURES, MODALITY_OF_TASK, task_of
from stages import section_of
from stages.base import StageConfig
from stages.data.config import DataConfig
from stages.data.load import check_named
from stages.data.sources import check_source, modality_of
from stages.data.sources.base import PLURALS
from stages.export import ExportConfig
from stages.finetune import FinetuneConfig
from stages.merge_lora import MergeLoraConfig
from stages.package import PackageConfig
from stages.quantize import QuantizeConfig
from stages.validate import ValidateConfig
from stages.validate.robustness import corruptions_for

RECIPES = Path(__file__).parent / "recipes"

ANY_FEATURES = "feature-extraction"
"""A task that is one of three, by what the examples are."""


class PipelineConfig(StageConfig):
    """The whole of `pipeline.yaml`. The smallest file names a task, a backbone and data."""

    task: TaskName = Field(
        description="What the adapted network does. feature-extraction stands for image-, text- or audio-features, by "
        "what the examples are.",
        json_schema_extra={"enum": [*get_args(TaskName), ANY_FEATURES]},
    )
    backbone: str = Field(
        description="timm:<name>, hf:<org>/<repo>@<revision>, or a local folder with a checkpoint in safetensors."
    )
    data: DataConfig = Field(description="Where the labelled examples come from and how they are split.")
    seed: int = Field(default=0, ge=0, description="Seed of every random choice.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where training runs. auto: CUDA when a GPU is there, else the CPU."
    )
    threads: int = Field(default=2, ge=1, description="CPU threads of every runtime (number).")
    finetune: FinetuneConfig = Field(default_factory=FinetuneConfig, description="Adapt the backbone to the data.")
    merge_lora: MergeLoraConfig = Field(
        default_factory=MergeLoraConfig, description="Fold the adapters into the base weights."
    )
    export: ExportConfig = Field(default_factory=ExportConfig, description="Write the network as ONNX.")
    quantize: QuantizeConfig = Field(
        default_factory=QuantizeConfig, description="Make lower-precision candidates within a budget."
    )
    validate_: ValidateConfig = Field(
        default_factory=ValidateConfig, alias="validate", description="Measure every candidate against PyTorch."
    )
    package: PackageConfig = Field(default_factory=PackageConfig, description="Pack what passed.")

    def section(self, stage: str) -> StageConfig:
        """The configuration of one stage."""
        name = section_of(stage)
        section: StageConfig = getattr(self, "validate_" if name == "validate" else name)
        return section


def load_config(file: Path, settings: Sequence[str] = ()) -> tuple[PipelineConfig, BackboneSpec]:
    """Read `file`, apply `settings` (`dotted.key=value`) and resolve the backbone.

    Raises:
        ConfigError: with every problem found in the file, the settings and the backbone id.
    """
    values, lines = read_yaml(file)
    values = without_empty_sections(values, PipelineConfig)
    find_beside(file, values)
    return make_config(values, lines, file, settings)


def make_config(
    values: dict[str, Any], lines: dict[tuple[str, ...], str], file: Path, settings: Sequence[str]
) -> tuple[PipelineConfig, BackboneSpec]:
    """`load_config` of values that were read already; `lines` names the place of each key, `file` that of the others.

    Raises:
        ConfigError: with every problem found in the values, the settings and the backbone id.
    """
    problems: list[Problem] = []
    for setting in settings:
        problem = apply_setting(values, setting)
        if problem:
            problems.append(problem)
        else:
            *sections, key = setting.split("=", 1)[0].split(".")
            lines[(*sections, key)] = f"--set {setting}"
            for length in range(1, len(sections) + 1):
                lines.setdefault(tuple(sections[:length]), f"--set {setting}")
    with collected(problems, lines, file, "task"):
        values = with_task(values)
    config: PipelineConfig | None = None
    try:
        config = PipelineConfig.model_validate(values)
    except ValidationError as error:
        known = {problem.place for problem in problems}
        # Where it cannot be told what feature-extraction stands for, that was said, or the data are missing.
        if values.get("task") == ANY_FEATURES:
            known.add(f"{place_of(('task',), lines, str(file))} task")
        problems += [one for one in problems_from_validation(error, lines, str(file)) if one.place not in known]
    spec: BackboneSpec | None = None
    if isinstance(values.get("backbone"), str):
        with collected(problems, lines, file, "backbone"):
            spec = resolve(values["backbone"])
            if config is not None:
                if config.finetune.names_labels:
                    check_label_names(spec, config.task)
                else:
                    check_task(spec, config.task)
                check_launch(config)
                check_locked_tower(config)
    data, task = values.get("data"), str(values.get("task"))
    # Where feature-extraction could not be told, any modality says whether there is a source at all.
    modality = MODALITY_OF_TASK.get(FEATURES["image"] if task == ANY_FEATURES else task)
    if modality and isinstance(data, dict) and isinstance(data.get("source"), str):
        with collected(problems, lines, file, "data", "source"):
            check_source(data["source"], modality)
    if config is not None:
        with collected(problems, lines, file, "data", "label_names"):
            check_named(config.data, config.task)
        with collected(problems, lines, file, "validate", "gates", "max_drops"):
            check_max_drops(config)
        with collected(problems, lines, file, "validate", "robustness"):
            check_robustness(config)
    if problems or config is None or spec is None:
        raise ConfigError(problems)
    return config, spec


def with_task(values: dict[str, Any]) -> dict[str, Any]:
    """The values with the task that `feature-extraction` stands for: by the one column of contents that the data
    section names, by a look at the data, or by the backbone.

    Raises:
        ConfigError: none of them says what the examples are, or there is no such task.
    """
    data = values.get("data")
    if values.get("task") != ANY_FEATURES or not isinstance(data, dict):
        return values
    keys = {modality: f"{modality}_column" for modality in FEATURES}
    named = [modality for modality, key in keys.items() if key in data]
    columns = {modality: str(data.get(key, DataConfig.model_fields[key].default)) for modality, key in keys.items()}
    modality, found = None, "neither data nor backbone say what the examples are"
    try:
        modality = named[0] if len(named) == 1 else modality_of(str(data.get("source")), columns)
    except DataError as error:
        found = str(error)
    if modality is None and str(values.get("backbone")).startswith("timm:"):
        modality = "image"
    if modality not in FEATURES:
        found = f"data.source holds {PLURALS[modality]}" if modality else found
        hint = f"write one of {', '.join(FEATURES.values())}"
        raise ConfigError([Problem("task", f"{ANY_FEATURES} is one of three tasks: {found}", hint)])
    return {**values, "task": FEATURES[modality]}


def check_launch(config: PipelineConfig) -> None:
    """Raises `ConfigError` where several processes cannot train the task."""
    launch = config.finetune.launch
    pairs = config.finetune.strategy if config.finetune.strategy == "flyp" else config.task
    if (pairs == "flyp" or task_of(config.task).embeds) and (launch.count > 1 or launch.config_file):
        problem = f"{pairs} compares every pair of a batch with all others, which several processes do not share"
        raise ConfigError([Problem("finetune.launch", problem, "leave finetune.launch out")])


def check_locked_tower(config: PipelineConfig) -> None:
    """Raises `ConfigError` where the backbone has no towers."""
    if config.finetune.locked_tower and MODALITY_OF_TASK[config.task] != "image-text":
        problem = f"a backbone of {config.task} has one tower"
        raise ConfigError([Problem("finetune.locked_tower", problem, "leave finetune.locked_tower out")])


def check_max_drops(config: PipelineConfig) -> None:
    """Raises `ConfigError` for a margin of a metric that the task does not have."""
    known = task_of(config.task).further_metrics
    if unknown := [name for name in config.validate_.gates.max_drops if name not in known]:
        problem = f"{unknown[0]!r} is no other metric of {config.task}"
        raise ConfigError([Problem("validate.gates.max_drops", problem, f"expected one of {', '.join(known)}")])


def check_robustness(config: PipelineConfig) -> None:
    """Raises `ConfigError` for a corruption of what the task does not have."""
    asked = config.validate_.robustness
    fitting = [one.name for one in corruptions_for(config.task, True)]
    if unfit := [name for name in (asked if isinstance(asked, tuple) else ()) if name not in fitting]:
        problem = f"{unfit[0]} is no corruption of {config.task}"
        raise ConfigError([Problem("validate.robustness", problem, f"expected some of {', '.join(fitting)}")])


def without_empty_sections(values: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """The values without sections that hold nothing: a bare `finetune:` means the defaults."""
    kept = {}
    for key, value in values.items():
        field = fields_by_key(model).get(str(key))
        if field is not None and is_model(field.annotation):
            if value is None and not field.is_required():
                continue
            if isinstance(value, dict):
                value = without_empty_sections(value, field.annotation)
        kept[key] = value
    return kept


def find_beside(file: Path, values: dict[str, Any]) -> None:
    """Turn relative paths in the file into ones that lead there from here: they are looked for beside the file first,
    then in the working folder."""
    finetune = values.get("finetune")
    launch = finetune.get("launch") if isinstance(finetune, dict) else None
    validate = values.get("validate")
    named = (
        (values, "backbone"), (values.get("data"), "source"), (finetune, "from_run"), (launch, "config_file"),
        (validate, "baseline"),
    )  # fmt: skip
    for section, key in named:
        path = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(path, str):
            # An image–text backbone is two ids with a plus between them.
            parts = path.split("+") if key == "backbone" and not os.path.exists(file.parent / path) else [path]
            section[key] = "+".join(beside(file, part) for part in parts)
    receipts = validate.get("receipts") if isinstance(validate, dict) else None
    if isinstance(validate, dict) and isinstance(receipts, list):
        validate["receipts"] = [beside(file, one) if isinstance(one, str) else one for one in receipts]


def beside(file: Path, path: str) -> str:
    """The path as it leads there from here, where it is beside the file; else as it is."""
    # os.path: a name that no file system takes is not there, where pathlib raises.
    return str(file.parent / path) if path and os.path.exists(file.parent / path) else path


@contextmanager
def collected(problems: list[Problem], lines: Mapping[tuple[str, ...], str], file: Path, *path: str) -> Iterator[None]:
    """Add what a look beyond the file finds to the other problems, with the place of the key."""
    try:
        yield
    except ConfigError as error:
        place = f"{place_of(path, lines, str(file))} {'.'.join(path)}"
        problems += [Problem(place, item.message, item.hint) for item in error.problems]


def read_yaml(file: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """The values of a YAML file, and for each key path its place as `file:line`."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            [Problem(str(file), "no such file", "write one with `pipeline init`, or name it with --config FILE")]
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(str(file), f"cannot be read: {error}", "expected a UTF-8 text file")]) from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
        places = list(key_lines(node, ()))
    except RecursionError as error:
        raise ConfigError([Problem(str(file), "refers to itself", "remove the anchor (&) and alias (*)")]) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark else str(file)
        raise ConfigError([Problem(place, f"is not valid YAML: {getattr(error, 'problem', error)}")]) from error
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigError([Problem(str(file), "holds no keys", "it must name at least task, backbone and data")])
    lines: dict[tuple[str, ...], str] = {}
    problems = []
    for path, line in places:
        if path in lines:
            problems.append(Problem(f"{file}:{line} {'.'.join(path)}", f"stands twice (first at {lines[path]})"))
        lines.setdefault(path, f"{file}:{line}")
    if problems:
        raise ConfigError(problems)
    return values, lines


def key_lines(node: yaml.Node | None, prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    """Every key path below a YAML node with its line, counted from 1."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, str(key.value))
            yield path, key.start_mark.line + 1
            yield from key_lines(value, path)


def apply_setting(values: dict[str, Any], setting: str) -> Problem | None:
    """Put one `dotted.key=value` into `values`; the value is read as YAML."""
    key, equals, text = setting.partition("=")
    if not equals or not key:
        return Problem(f"--set {setting}", "is not of the form dotted.key=value", "e.g. --set finetune.epochs=2")
    *parents, last = key.split(".")
    target = values
    for parent in parents:
        child = target.setdefault(parent, {})
        if not isinstance(child, dict):
            return Problem(f"--set {setting}", f"{parent!r} is a value, not a section")
        target = child
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        target[last] = text
    return None


def problems_from_validation(error: ValidationError, lines: Mapping[tuple[str, ...], str], file: str) -> list[Problem]:
    """Pydantic's findings as problems with places and suggestions."""
    problems = []
    for item in error.errors():
        path = tuple(str(part) for part in item["loc"])
        place = f"{place_of(path, lines, file)} {'.'.join(path)}"
        if item["type"] == "extra_forbidden":
            known = keys_at(path[:-1])
            near = difflib.get_close_matches(path[-1], known, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            problems.append(Problem(place, "unknown key", hint))
        elif item["type"] == "missing":
            problems.append(Problem(place, "is missing", description_at(path)))
        else:
            hint = ""
            if item["type"] == "literal_error" and isinstance(item["input"], str):
                near = difflib.get_close_matches(item["input"], literals_at(path), 1, 0.4)
                hint = f"did you mean {near[0]!r}?" if near else ""
            # Of settings that contradict each other the message names what was found.
            together = item["type"] == "value_error" and isinstance(item["input"], dict)
            found = "" if together else f"found {item['input']!r}: "
            problems.append(Problem(place, found + item["msg"].removeprefix("Value error, "), hint))
    return problems


def place_of(path: tuple[str, ...], lines: Mapping[tuple[str, ...], str], file: str) -> str:
    """The place of the key, or of the nearest section around it."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return file


def model_at(path: Sequence[str]) -> type[BaseModel] | None:
    """The configuration class that stands at a key path."""
    model: type[BaseModel] = PipelineConfig
    for part in path:
        field = fields_by_key(model).get(part)
        inner = [kind for kind in (field.annotation, *get_args(field.annotation)) if is_model(kind)] if field else []
        if not inner:
            return None
        model = inner[0]
    return model


def is_model(kind: Any) -> bool:
    """Whether an annotation is a configuration class."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def fields_by_key(model: type[BaseModel]) -> dict[str, Any]:
    """The fields of a configuration class by the key used in the file."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def keys_at(path: Sequence[str]) -> list[str]:
    """The known keys at a key path."""
    model = model_at(path)
    return list(fields_by_key(model)) if model else []


def description_at(path: Sequence[str]) -> str:
    """The description of the field at a key path."""
    model = model_at(path[:-1])
    field = fields_by_key(model).get(path[-1]) if model else None
    return (field.description or "") if field else ""


def literals_at(path: Sequence[str]) -> list[str]:
    """The allowed words of the field at a key path (list items included)."""
    names = [part for part in path if not part.isdigit()]
    model = model_at(names[:-1])
    field = fields_by_key(model).get(names[-1]) if model else None
    return [word for word in words_in(field.annotation) if isinstance(word, str)] if field else []


def words_in(annotation: Any) -> Iterator[Any]:
    """All arguments of an annotation's literals, however deep."""
    for argument in get_args(annotation):
        if get_args(argument):
            yield from words_in(argument)
        else:
            yield argument
