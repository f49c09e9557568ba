"""The command line. Imports the standard library and typer only: `pipeline --help` must be quick."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.errors import ConfigError, MissingCapabilityError, PipelineError, Problem
from pipeline import interrupts
from stages import STAGES

if TYPE_CHECKING:
    from pipeline.runner import Runner

OWN_PACKAGES = ("pipeline", "stages", "models")
EXIT_GATE_FAILED = 1
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="pipeline",
    help="From a pretrained backbone to a proven bundle: "
    "finetune → merge-lora → export → quantize → validate → package.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

STAGE_HELP = {
    "finetune": "Adapt the backbone to the data: an adapter or a checkpoint.",
    "merge-lora": "Fold the adapter into the base weights and prove that nothing changed.",
    "export": "Write the network as ONNX and prove parity at other shapes.",
    "quantize": "Make candidates of lower precision that stay inside their budget.",
    "validate": "Measure every candidate against PyTorch on the test split and check the gates.",
    "package": "Pack the candidate that passed into a bundle.",
}

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The configuration file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override one value: dotted.key=value. May be repeated.")
]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", help="Folder of the run. Default: runs/<name of the config file>.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Run also what is fresh.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would run and why; run nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="The result as JSON on standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Errors only.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Also what the libraries say.")]


ReceiptOption = Annotated[
    list[str] | None,
    typer.Option("--receipt", help="A device's receipt of an engine, from `pipeline verify`. May be repeated."),
]
SelfTestOption = Annotated[
    bool, typer.Option("--self-test", help="Inject known defects into this model and report which the gates catch.")
]


def add_stage_command(name: str) -> None:
    """One command a stage; each is `all --from NAME --until NAME`."""

    def command(
        config: ConfigOption = Path("pipeline.yaml"),
        set_: SetOption = None,
        run_dir: RunDirOption = None,
        force: ForceOption = False,
        dry_run: DryRunOption = False,
        json_: JsonOption = False,
        quiet: QuietOption = False,
        verbose: VerboseOption = False,
    ) -> None:
        run_stages([name], config, set_ or [], run_dir, force, dry_run, json_, quiet, verbose)

    app.command(name, help=STAGE_HELP[name])(command)


for stage_name in STAGES:
    if stage_name != "validate":
        add_stage_command(stage_name)


@app.command("validate", help=STAGE_HELP["validate"])
def run_validate(
    config: ConfigOption = Path("pipeline.yaml"),
    set_: SetOption = None,
    receipt: ReceiptOption = None,
    self_test: SelfTestOption = False,
    run_dir: RunDirOption = None,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """The stage's command, with what devices say of its engines, and the test of its gates."""
    settings = [*(set_ or []), *([f"validate.receipts={json.dumps(receipt)}"] if receipt else [])]
    settings += ["validate.self_test=true"] if self_test else []
    run_stages(["validate"], config, settings, run_dir, force, dry_run, json_, quiet, verbose)


@app.command("all", help="Run the whole chain; skip what is fresh.")
def run_all(
    config: ConfigOption = Path("pipeline.yaml"),
    set_: SetOption = None,
    run_dir: RunDirOption = None,
    from_: Annotated[str, typer.Option("--from", help="First stage.")] = "finetune",
    until: Annotated[str, typer.Option("--until", help="Last stage.")] = "package",
    self_test: SelfTestOption = False,
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    json_: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run the stages from `--from` until `--until`."""
    names = list(STAGES)
    problems = [
        Problem(option, f"{value!r} is no stage", f"stages: {', '.join(names)}")
        for option, value in (("--from", from_), ("--until", until))
        if value not in names
    ]
    if problems:
        raise ConfigError(problems)
    selected = names[names.index(from_) : names.index(until) + 1]
    if not selected:
        raise ConfigError(f"--from {from_} comes after --until {until}; the order is {', '.join(names)}")
    settings = [*(set_ or []), *(["validate.self_test=true"] if self_test else [])]
    run_stages(selected, config, settings, run_dir, force, dry_run, json_, quiet, verbose)


def run_stages(
    names: list[str],
    config: Path,
    settings: list[str],
    run_dir: Path | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Load the configuration, then plan or run `names`."""
    from pipeline.config import load_config
    from pipeline.runner import Runner
    from pipeline.terminal import configure_logging, make_progress

    loaded, backbone = load_config(config, settings)
    runner = Runner(
        config=loaded,
        backbone=backbone,
        run_dir=run_dir or Path("runs") / config.stem,
        log=configure_logging(quiet, verbose),
        progress=make_progress(quiet),
        force=force,
    )
    if dry_run:
        print_plan(runner, names, as_json)
        return
    try:
        status = runner.run(names)
    except ConfigError:
        raise
    except PipelineError as error:
        if as_json:
            print_json(runner.run_record("failed"))
            error.on_stdout = True
        raise
    except KeyboardInterrupt:
        if as_json:
            print_json(runner.run_record("interrupted"))
        raise
    if as_json:
        print_json(runner.run_record(status))
    elif not quiet:
        from pipeline.terminal import print_summary

        print_summary(runner.run_record(status), runner.run_dir)
    if status == "gate-failed":
        raise typer.Exit(EXIT_GATE_FAILED)


def print_plan(runner: Runner, names: list[str], as_json: bool) -> None:
    """What would run, what is fresh, and why."""
    plan = runner.plan(names)
    if as_json:
        print_json([vars(decision) for decision in plan])
        return
    for decision in plan:
        say(f"{decision.stage:<12}{'fresh' if decision.fresh else 'runs':<7}{decision.reason}")


def say(text: str, err: bool = False) -> None:
    """Print what may hold names from outside: none of them is an order to the terminal or to a CI log."""
    from pipeline.report.markup import log_text

    echo(log_text(text), err)


def fields(*values: object) -> str:
    """Values with a tab between them, of which none holds a tab or a line break."""
    from pipeline.report.markup import field_text

    return "\t".join(map(field_text, values))


def echo(text: str, err: bool = False) -> None:
    """Print a line. A reader that has closed the pipe (`| head`) has seen enough: the exit code stays the command's."""
    try:
        typer.echo(text, err=err)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (sys.stderr if err else sys.stdout).fileno())


def print_json(value: Any) -> None:
    """A value as JSON on standard output."""
    from pipeline.report.markup import json_text

    echo(json_text(json.dumps(value, indent=2, ensure_ascii=False)))


@app.command()
def init(
    task: Annotated[str | None, typer.Option(help="What the network does, e.g. image-classification.")] = None,
    backbone: Annotated[str | None, typer.Option(help="timm:<name>, hf:<org>/<repo> or a folder.")] = None,
    data: Annotated[str | None, typer.Option(help="demo:<name>, a folder, a file or hf:<dataset>.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path("pipeline.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a commented pipeline.yaml; asks for what is missing on a terminal."""
    from pipeline.init import write_config

    answers = {"task": task, "backbone": backbone, "data": data}
    missing = [name for name, value in answers.items() if value is None]
    if missing and not sys.stdin.isatty():
        raise ConfigError([Problem(f"--{name}", "is missing", "give it, or run on a terminal") for name in missing])
    for name in missing:
        answers[name] = typer.prompt({"task": "Task", "backbone": "Backbone", "data": "Data source"}[name])
    write_config(output, str(answers["task"]), str(answers["backbone"]), str(answers["data"]), force)
    echo(f"wrote {output}; next: pipeline all -c {output}")


@app.command()
def rank(
    backbones: Annotated[list[str], typer.Argument(help="timm:<name>, hf:<org>/<repo> or folders.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="The configuration file; not needed with --task and --data.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="What the network does, e.g. image-classification.")] = None,
    data: Annotated[str | None, typer.Option(help="demo:<name>, a folder, a file or hf:<dataset>.")] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Use only so many training examples.")] = None,
    image_size: Annotated[int | None, typer.Option(min=16, help="Side of the input image in pixels.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the folds.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads that latency is measured with.")] = None,
    set_: SetOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result as JSON there too.")] = None,
    json_: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="The result only, no progress.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Which backbone fits the data, and what each would cost."""
    from pipeline.rank import exit_code_of, print_ranking, rank_backbones, read_request, write_record
    from pipeline.terminal import configure_logging, make_progress

    options = {
        "task": task,
        "data.source": data,
        "data.max_train_samples": max_samples,
        "finetune.image_size": image_size,
        "seed": seed,
        "threads": threads,
    }
    loaded, specs = read_request(backbones, config, options, set_ or [], output)
    record = rank_backbones(loaded, specs, configure_logging(quiet, verbose), make_progress(quiet))
    if output:
        write_record(output, record)
    if json_:
        print_json(record)
    else:
        print_ranking(record)
    if code := exit_code_of(record):
        raise typer.Exit(code)


@app.command()
def predict(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder or tar.")],
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Image or audio files, or texts (two with a tab between them where they are compared); - reads lines."
        ),
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(help="image-text: a text to compare each image with (repeatable); the nearest is the answer."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Of tasks that give an embedding: write them there, float32 (inputs, width), as .npy.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    json_: JsonOption = False,
) -> None:
    """Predict with a bundle. Needs no torch."""
    from models.bundle import open_bundle

    with open_bundle(bundle) as opened:
        words = [line.rstrip("\n") for line in sys.stdin] if inputs == ["-"] else inputs
        if output and opened.kind.embeds != 1:
            problem = f"takes embeddings, one an input, and this bundle's task is {opened.task}"
            raise ConfigError([Problem("--output", problem, "leave it out, or take a bundle of feature-extraction")])
        if output:
            check_writable(output)
        if text:
            if opened.task != "image-text":
                problem = f"compares texts with images, and this bundle's task is {opened.task}"
                raise ConfigError([Problem("--text", problem, "leave it out, or take a bundle of the task image-text")])
            print_nearest(words, text, opened.similarities([Path(word) for word in words], text, threads), json_)
            return
        contents = [opened.processing.from_argument(word) for word in words]
        answers = opened.predict(contents, threads=threads)
        if opened.kind.embeds == 1:
            print_embeddings(words, [one.embedding for one in answers], output, json_)
            return
        if json_:
            rows = [
                {"input": item, "label": one.label, "score": one.score, "probabilities": one.probabilities}
                for item, one in zip(words, answers, strict=True)
            ]
            print_json(rows)
            return
        for item, one in zip(words, answers, strict=True):
            echo(fields(one.label, f"{one.score:.4f}", item))


def check_writable(file: Path) -> None:
    """A look, before the work, at whether a file can be written there. Raises `ConfigError`."""
    problem = ""
    if file.is_dir():
        problem = "is a folder"
    elif not file.absolute().parent.is_dir():
        problem = "its folder is not there"
    elif not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        problem = "permission denied"
    if problem:
        raise ConfigError([Problem(f"--output {file}", f"cannot be written: {problem}", "name another file")])


def print_embeddings(inputs: list[str], vectors: list[tuple[float, ...]], output: Path | None, as_json: bool) -> None:
    """The vector of each input: into the file, as JSON, or as numbers with a space between and the input behind."""
    import numpy as np

    if output:
        try:
            with output.open("wb") as stream:
                np.save(stream, np.array(vectors, np.float32), allow_pickle=False)
        except OSError as error:
            problem = f"cannot be written: {error.strerror or error}"
            raise ConfigError([Problem(f"--output {output}", problem, "name another file")]) from error
    elif not as_json:
        for item, vector in zip(inputs, vectors, strict=True):
            echo(fields(" ".join(f"{value:.6g}" for value in vector), item))
    if as_json:
        rows = [{"input": item, "embedding": vector} for item, vector in zip(inputs, vectors, strict=True)]
        print_json(rows)


def print_nearest(images: list[str], texts: list[str], near: Any, as_json: bool) -> None:
    """For each image the text of the largest similarity. `near`: float64 (images, texts)."""
    found = [dict(zip(texts, map(float, row), strict=True)) for row in near]
    best = [max(row, key=lambda text: row[text]) for row in found]
    if as_json:
        rows = zip(images, best, found, strict=True)
        print_json(
            [{"input": item, "label": text, "score": row[text], "similarities": row} for item, text, row in rows]
        )
        return
    for item, text, row in zip(images, best, found, strict=True):
        echo(fields(text, f"{row[text]:.4f}", item))


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder or tar.")],
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    proof: Annotated[
        Path | None, typer.Option(help="The folder that a script of the bundle (engines/*.sh) has filled here.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Which of the engine's targets this device is.")] = None,
    receipt: Annotated[
        Path | None, typer.Option(help="With --proof: write there what `pipeline validate --receipt` takes.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Check a bundle on this device: digests and golden-sample parity, of an engine too."""
    from models.bundle import Check, VerifyReport, open_bundle

    if (proof is None) != (receipt is None):
        raise ConfigError([Problem("--proof, --receipt", "go together", "name the folder, and the file to write")])
    with open_bundle(bundle) as opened:
        report = opened.verify(threads=threads)
        if proof is not None and receipt is not None:
            from models.engines.receipt import make_receipt

            made = make_receipt(opened, proof, target)
            receipt.write_text(json.dumps(made.to_dict(), indent=2) + "\n", encoding="utf-8")
            message = f"largest error {made.max_abs_error}, tolerance {made.tolerance:.3g}; "
            message += f"{made.latency_ms_p50:.3g} ms at batch 1 (p50); written to {receipt}"
            check = Check(f"engine {made.engine} on {made.target}", made.within, message)
            report = VerifyReport((*report.checks, check))
    if json_:
        rows = [{"name": check.name, "ok": check.ok, "message": check.message} for check in report.checks]
        print_json({"ok": report.ok, "checks": rows})
    else:
        for check in report.checks:
            say(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.message}")
    if not report.ok:
        raise typer.Exit(EXIT_GATE_FAILED)


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A run, a stage's folder, or a bundle.")],
    json_: JsonOption = False,
) -> None:
    """Lineage, numbers and gates of a run, an artifact or a bundle."""
    from pipeline.show import describe, print_description

    description = describe(path)
    if json_:
        print_json(description)
    else:
        print_description(description)


@app.command()
def diff(
    before: Annotated[Path, typer.Argument(help="The older run's folder, or a bundle.")],
    after: Annotated[Path, typer.Argument(help="The newer run's folder, or a bundle.")],
    max_metric_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="How far a metric may fall (0.01 = 1 point). Default: the stricter validate.gates.max_metric_drop.",
        ),
    ] = None,
    allow_other_data: Annotated[
        bool, typer.Option("--allow-other-data", help="Compare metrics of other test examples too.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """What changed between two runs: config, data, numbers, gates; 1 where a gate or a metric fell."""
    from pipeline.diff import compare, print_difference, read_side

    difference = compare(read_side(before), read_side(after), max_metric_drop, allow_other_data)
    if json_:
        print_json(difference)
    else:
        print_difference(difference)
    if difference["regressions"]:
        raise typer.Exit(EXIT_GATE_FAILED)


@app.command("report", help="The report of a run in another form, on standard output: what CI shows.")
def print_report(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="markdown (a job summary or a comment), github (annotations), json, junit, html or in-toto.",
        ),
    ] = "markdown",
) -> None:
    """Render the record of a run; a run that failed is reported as well."""
    from pipeline.record import read_run
    from pipeline.report import FORMATS, render

    known = {str(one): one for one in FORMATS}
    if form not in known:
        raise ConfigError([Problem("--format", f"{form!r} is no form of a report", f"one of {', '.join(known)}")])
    text = render(read_run(run), known[form])
    if not text:
        raise ConfigError([Problem(str(run), f"has nothing that a report as {form} could be about", "run validate")])
    echo(text.removesuffix("\n"))


@app.command()
def doctor(
    edge: Annotated[bool, typer.Option("--edge", help="Only what predict and verify need.")] = False,
    json_: JsonOption = False,
) -> None:
    """What works on this machine, and the line that mends what does not."""
    from pipeline.doctor import examine, examine_edge

    findings = examine_edge() if edge else examine()
    if json_:
        print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            echo(f"{finding.state:<8}{finding.name:<26}{finding.message}")
            if finding.mend:
                echo(f"{'':<34}mend: {finding.mend}")
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(MissingCapabilityError.exit_code)


@app.command()
def schema() -> None:
    """The JSON Schema of pipeline.yaml, for editors."""
    from pipeline.config import PipelineConfig

    print_json(PipelineConfig.model_json_schema())


def print_version(asked: bool) -> None:
    """`pipeline --version`."""
    if asked:
        from importlib import metadata

        echo(f"pipeline {metadata.version('adapt-to-edge')}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the program itself."""


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code of the contract."""
    as_json = "--json" in (sys.argv[1:] if arguments is None else arguments)
    try:
        result: Any = app(args=arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        result = EXIT_INTERRUPTED
    except Exception as error:  # the outermost frame: Python's own exit code, 1, would read as "a gate failed"
        result = EXIT_INTERRUPTED if interrupts.asked() else report(error, as_json)
    if result == EXIT_INTERRUPTED:  # typer itself turns an interrupt into this code, without a word
        echo("interrupted; the same command goes on from here", err=True)
    return result if isinstance(result, int) else 0


def report(error: Exception, as_json: bool) -> int:
    """Say what went wrong, on standard error and with `--json` on standard output too; the exit code."""
    if isinstance(error, typer_usage_errors()):
        error.show()
        error = ConfigError(error.format_message())
    elif isinstance(error, ConfigError):
        count = len(error.problems)
        echo(f"error: {count} problem{'s' * (count > 1)}; nothing was run", err=True)
        for problem in error.problems:
            say(f"  {problem}", err=True)
    elif isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in OWN_PACKAGES:
        error = missing_package(error)
        echo(f"error: {error}", err=True)
    elif isinstance(error, PipelineError):
        say(f"error: {error}", err=True)
    else:
        traceback.print_exception(error)
        echo("error: this is a defect of the pipeline, not of your input; please report it", err=True)
        error = PipelineError(f"defect: {type(error).__name__}: {error}")
    if as_json and not error.on_stdout:
        said: dict[str, Any] = {"error": str(error)}
        if isinstance(error, ConfigError):
            said = {"problems": [vars(one) for one in error.problems]}
        print_json({"ok": False, "exit_code": error.exit_code, **said})
    return error.exit_code


def missing_package(error: ModuleNotFoundError) -> MissingCapabilityError:
    """A library that is not installed, with the line that installs it."""
    module = (error.name or "?").partition(".")[0]
    package = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}.get(module, module.replace("_", "-"))
    return MissingCapabilityError(
        f"the package {package} is not installed here. Install it: pip install {package}; "
        "for everything that the stages need, in a clone: make env"
    )


def typer_usage_errors() -> type[Any]:
    """The base of what a wrong option or argument raises: click's, or the copy that newer typer carries."""
    return next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main() -> None:
    """Entry point of the console script; SIGTERM ends a run like an interrupt."""
    interrupts.install()
    sys.exit(run())
