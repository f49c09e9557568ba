"""What a person sees on the terminal: log lines and progress on standard error, the summary on standard output."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from pipeline.progress import BarProgress, LineProgress, QuietProgress
from pipeline.report.markup import log_text
from stages.base import Progress

LIBRARY_LOGGERS = (
    "huggingface_hub",
    "torch",
    "transformers",
    "timm",
    "peft",
    "onnxscript",
    "onnx_ir",
    "datasets",
    "accelerate",
    "optimum",
)


class SafeFormatter(logging.Formatter):
    """Names of labels and files, and what libraries say of them, give no orders to a terminal or to a CI log."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, every line of it made safe."""
        return log_text(super().format(record))


def configure_logging(quiet: bool, verbose: bool) -> logging.Logger:
    """The project's logger on standard error; libraries speak only when `verbose`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SafeFormatter("%(message)s"))
    log = logging.getLogger("pipeline")
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        warnings.filterwarnings("ignore")
        for name in LIBRARY_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("ORT_LOG_SEVERITY_LEVEL", "3")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return log


def make_progress(quiet: bool) -> Progress:
    """Bars on a terminal, lines in a log, nothing when quiet."""
    if quiet:
        return QuietProgress()
    from rich.console import Console

    console = Console(stderr=True)
    return BarProgress(console) if console.is_terminal else LineProgress(console)


def print_summary(record: dict[str, Any], run_dir: Path) -> None:
    """The report's short form, and where the report and the bundle are."""
    from rich.console import Console

    from pipeline.report.terminal import print_summary as print_table

    console = Console()
    print_table(record, console)
    console.print(f"report  {run_dir / record['report']}", highlight=False, soft_wrap=True)
    if record["bundle"]:
        console.print(f"bundle  {run_dir / record['bundle']}", highlight=False, soft_wrap=True)
