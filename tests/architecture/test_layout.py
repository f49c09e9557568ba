"""What must hold of the code as a whole: layers, imports, the table of stages, documentation, dependencies."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.config import PipelineConfig, fields_by_key, is_model, with_task
from stages import STAGES, load_stage, section_of
from stages.base import NETWORK_PACKAGES, PROCESSING_PACKAGES

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "stages", "models")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

HEAVY = {
    "torch", "torchvision", "timm", "transformers", "peft", "accelerate", "datasets", "onnx", "onnxscript",
    "onnxruntime", "onnxconverter_common", "sklearn", "scipy", "pandas", "pyarrow", "huggingface_hub",
}  # fmt: skip
"""Libraries that take longer to import than a person waits for an error message."""

NETWORK_MODULES = {
    "models/backbones/from_hf.py", "models/backbones/from_timm.py", "models/classifier.py",
    "models/fake_quantization.py",
}  # fmt: skip
"""Modules that define torch modules: imported only where a network is built."""

EDGE_MODULES = (
    "models/__init__.py",
    "models/bundle.py",
    "models/engines/receipt.py",
    "models/errors.py",
    "models/spec.py",
    "models/modalities/__init__.py",
    "models/modalities/audio.py",
    "models/modalities/image_text.py",
    "models/modalities/text.py",
    "models/modalities/vision.py",
    "models/runtimes/__init__.py",
    "models/runtimes/base.py",
    "models/runtimes/onnxruntime_session.py",
)
EDGE_LIBRARIES = {"numpy", "PIL", "tokenizers", "soundfile", "soxr", "onnxruntime", "models"}


def name_of(path: Path) -> str:
    """The path inside the repository."""
    return path.relative_to(ROOT).as_posix()


def imported_roots(nodes: list[ast.stmt], *, inside_functions: bool) -> Iterator[str]:
    """Top-level names of the modules that are imported at run time, `TYPE_CHECKING` blocks left out."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from imported_roots(node.orelse, inside_functions=inside_functions)
        elif inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody", "handlers"):
                children = [child for child in getattr(node, field, []) if isinstance(child, ast.stmt)]
                handlers = [child for child in getattr(node, field, []) if isinstance(child, ast.ExceptHandler)]
                for handler in handlers:
                    children += handler.body
                yield from imported_roots(children, inside_functions=inside_functions)


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_the_import_contracts_hold() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    found = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "3 kept, 0 broken" in found.stdout


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_heavy_libraries_are_imported_inside_functions(path: Path) -> None:
    if name_of(path) in NETWORK_MODULES:
        pytest.skip("defines torch modules")
    assert not HEAVY & set(imported_roots(parse(path).body, inside_functions=False))


@pytest.mark.parametrize("name", EDGE_MODULES)
def test_the_device_needs_only_six_libraries(name: str) -> None:
    found = set(imported_roots(parse(ROOT / name).body, inside_functions=True))
    assert found - sys.stdlib_module_names <= EDGE_LIBRARIES


def test_planning_a_run_loads_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "import pipeline.cli, pipeline.config, pipeline.runner, pipeline.report, pipeline.terminal\n"
        "from stages import STAGES, load_stage\n"
        "[load_stage(name) for name in STAGES]\n"
        f"print(*sorted({HEAVY!r} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_exception_is_swallowed_wholesale(path: Path) -> None:
    """`cli.py` alone has an outermost handler, and only to choose the exit code after printing the trace."""
    wide = [
        handler.lineno
        for handler in ast.walk(parse(path))
        if isinstance(handler, ast.ExceptHandler)
        and (handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException"))
        and not (handler.body and isinstance(handler.body[-1], ast.Raise))
    ]
    assert len(wide) <= (name_of(path) == "pipeline/cli.py"), f"{name_of(path)}, lines {wide}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_executes_what_it_reads(path: Path) -> None:
    """No pickles, no remote code, no `eval`."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            assert not names & {"pickle", "joblib", "dill", "cloudpickle", "marshal"}
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert called not in ("eval", "exec", "yaml.load")
        assert arguments.get("trust_remote_code", "False") == "False"
        if called == "torch.load":
            assert arguments.get("weights_only") == "True"
        if called in ("np.load", "numpy.load"):
            assert arguments.get("allow_pickle") == "False"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_names_are_documented(path: Path) -> None:
    tree = parse(path)
    assert ast.get_docstring(tree) or not tree.body, "the module has no docstring"
    missing = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not missing


def test_the_stages_are_in_order_and_have_their_sections() -> None:
    before: list[str] = []
    sections = fields_by_key(PipelineConfig)
    for name in STAGES:
        stage = load_stage(name)
        assert stage.name == name
        assert set(stage.consumes) <= set(before)
        assert sections[section_of(name)].annotation is stage.config_type
        before.append(name)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_what_every_stage_uses(stage: str) -> None:
    """Each builds a network and prepares examples; the versions of what does that are in its freshness key."""
    packages = set(load_stage(stage).packages)
    assert {*NETWORK_PACKAGES, *PROCESSING_PACKAGES} <= packages
    assert {normalized(name) for name in packages} <= {
        normalized(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_says_what_it_reads_writes_and_gates(stage: str) -> None:
    module = sys.modules[type(load_stage(stage)).__module__]
    for word in ("Reads:", "Writes:", "Gates:", "Fails when:"):
        assert word in (module.__doc__ or "")


def test_every_field_of_the_configuration_is_described() -> None:
    def undescribed(model: type, prefix: str) -> Iterator[str]:
        for key, field in fields_by_key(model).items():
            if is_model(field.annotation):
                yield from undescribed(field.annotation, f"{prefix}{key}.")
            if not field.description:
                yield f"{prefix}{key}"

    assert list(undescribed(PipelineConfig, "")) == []


# --- dependencies -------------------------------------------------------------------------------------


def normalized(requirement: str) -> str:
    """The distribution's name in a requirement, as PEP 503 writes it."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def test_every_dependency_is_pinned_by_name_and_version_only() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert all(re.fullmatch(r"[a-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines)
    asked = [*PROJECT["dependencies"], *(item for extra in PROJECT["optional-dependencies"].values() for item in extra)]
    assert {normalized(item) for item in asked} <= {normalized(line) for line in lines}


def test_one_onnxruntime_a_machine() -> None:
    """Side by side the two distributions overwrite each other's files."""
    for name in ("dependencies", "edge"):
        requirements = PROJECT["dependencies"] if name == "dependencies" else PROJECT["optional-dependencies"][name]
        markers = {normalized(item): item.partition(";")[2].strip() for item in requirements if "onnxruntime" in item}
        assert markers == {
            "onnxruntime-gpu": "sys_platform == 'linux' and platform_machine == 'x86_64'",
            "onnxruntime": "sys_platform != 'linux' or platform_machine != 'x86_64'",
        }


def test_doctor_asks_for_nothing_that_is_not_a_dependency() -> None:
    from pipeline.doctor import CORE

    assert {normalized(name) for name in CORE} <= {normalized(item) for item in PROJECT["dependencies"]}


def test_every_file_of_the_packages_is_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    packed = {path for package, globs in settings["package-data"].items() for glob in globs
              for path in (ROOT / package).glob(glob)}  # fmt: skip
    data = {
        path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert data <= packed


# --- documentation ------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_file_tree_of_the_readme_is_the_real_one() -> None:
    tree = README.split("<!-- tree -->")[1]
    listed: set[str] = set()
    folders: list[tuple[int, str]] = []
    for line in tree.strip().strip("`").splitlines():
        if not line.strip():
            continue
        indent, names = len(line) - len(line.lstrip()), line.split("  # ")[0].split()
        while folders and folders[-1][0] >= indent:
            folders.pop()
        parent = folders[-1][1] if folders else ""
        listed |= {parent + name for name in names}
        if names[0].endswith("/"):
            folders.append((indent, parent + names[0]))
    assert sorted(name for name in listed if not any(ROOT.glob(name))) == []
    modules = {name_of(path) for path in SOURCES if path.name != "__init__.py"}
    assert sorted(modules - listed) == []


def test_the_links_of_the_readme_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_yaml_of_the_readme_is_valid() -> None:
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)]
    configurations = [block for block in blocks if "backbone" in block]
    workflows = [block for block in blocks if "jobs" in block]
    assert len(configurations) >= 2
    assert len(workflows) == 1
    for block in configurations:
        PipelineConfig.model_validate(with_task(block))
    assert workflows[0]["jobs"]


def test_the_configuration_page_is_up_to_date() -> None:
    script = ROOT / "scripts" / "make_config_reference.py"
    found = subprocess.run([sys.executable, "-P", script, "--check"], cwd=ROOT)
    assert found.returncode == 0, "run `make docs`"


def test_the_readme_names_every_command_and_make_target() -> None:
    from pipeline.cli import app

    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert [name for name in sorted(commands) if f"`pipeline {name}" not in README] == []
    used = set(re.findall(r"\bmake ([a-z-]+)", README))
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert used <= targets
