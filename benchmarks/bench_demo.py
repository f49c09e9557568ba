"""The demo's wall time and peak memory by stage, against the same steps by hand: `make bench`.

    python -P benchmarks/bench_demo.py [--rounds 3] [--config pipeline/recipes/vision.yaml]

Each round runs, one after the other and in processes of their own: the pipeline in an empty run folder; the pipeline
again, where everything is fresh; and `by_hand.py`. Medians over the rounds, their ratio, and every single value go to
benchmarks/results/<date>.json. Times of the two are comparable only on an idle machine; the load is recorded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RECIPE = ROOT / "pipeline" / "recipes" / "vision.yaml"
PACKAGES = ("torch", "timm", "transformers", "peft", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy")


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="how often everything is measured")
    parser.add_argument("--config", type=Path, default=RECIPE, help="by_hand.py does the vision recipe only")
    arguments = parser.parse_args()
    rounds = [measure_round(arguments.config) for _ in range(arguments.rounds)]
    result = summarise(rounds, arguments.config)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{result['date'].replace(':', '')}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_table(result)
    print(f"\nwritten to {file.relative_to(ROOT)}")
    return 0


def measure_round(config: Path) -> dict[str, Any]:
    """The pipeline from nothing, the pipeline when all is fresh, and by hand."""
    command = [str(Path(sys.executable).with_name("pipeline")), "all", "--quiet", "-c", str(config)]
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        first_s, _ = timed([*command, "--run-dir", str(run_dir)])
        record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
        again_s, _ = timed([*command, "--run-dir", str(run_dir)])
    by_hand_s, output = timed([sys.executable, "-P", str(ROOT / "benchmarks" / "by_hand.py")])
    stages = {
        stage["name"]: {"seconds": stage["duration_s"], "peak_memory_bytes": stage["peak_memory_bytes"]}
        for stage in record["stages"]
    }
    by_hand = json.loads(output)
    return {
        "load_before": round(load_before, 2),
        "pipeline": {
            "wall_s": first_s,
            "again_wall_s": again_s,
            "peak_memory_bytes": peak_of(stages),
            "stages": stages,
            "accuracy": accuracy_of(record),
        },
        "by_hand": {"wall_s": by_hand_s, "peak_memory_bytes": peak_of(by_hand["steps"]), **by_hand},
    }


def peak_of(steps: Mapping[str, Mapping[str, float]]) -> float:
    """The largest peak of all steps: each starts the operating system's own count anew."""
    return max(step["peak_memory_bytes"] for step in steps.values())


def timed(command: Sequence[str]) -> tuple[float, str]:
    """Wall time in seconds and standard output of a command that must succeed."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return round(time.perf_counter() - started, 2), done.stdout


def accuracy_of(record: dict[str, Any]) -> dict[str, float]:
    """Test accuracies of a run, to see that both did the same work."""
    validated = next(stage["measurements"] for stage in record["stages"] if stage["name"] == "validate")
    found = {"pytorch": validated["reference"]["metric"]}
    return found | {candidate["name"]: candidate["metric"] for candidate in validated["candidates"]}


def summarise(rounds: list[dict[str, Any]], config: Path) -> dict[str, Any]:
    """Medians, ratios, and where this was measured."""

    def median(*path: str) -> float:
        values = rounds
        for key in path:
            values = [value[key] for value in values]
        return round(statistics.median(values), 2)  # type: ignore[type-var]

    names = list(rounds[0]["pipeline"]["stages"])
    stages = {
        name: {
            "pipeline_s": median("pipeline", "stages", name, "seconds"),
            "pipeline_peak_bytes": median("pipeline", "stages", name, "peak_memory_bytes"),
            "by_hand_s": median("by_hand", "steps", name, "seconds"),
            "by_hand_peak_bytes": median("by_hand", "steps", name, "peak_memory_bytes"),
        }
        for name in names
    }
    pipeline_s, by_hand_s = median("pipeline", "wall_s"), median("by_hand", "wall_s")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": str(config.resolve().relative_to(ROOT)),
        "machine": {"system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "versions": versions(),
        "summary": {
            "pipeline_s": pipeline_s,
            "by_hand_s": by_hand_s,
            "ratio": round(pipeline_s / by_hand_s, 3),
            "again_s": median("pipeline", "again_wall_s"),
            "pipeline_peak_bytes": median("pipeline", "peak_memory_bytes"),
            "by_hand_peak_bytes": median("by_hand", "peak_memory_bytes"),
            "stages": stages,
        },
        "rounds": rounds,
    }


def versions() -> dict[str, str]:
    """Installed versions of the libraries that do the work."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def print_table(result: dict[str, Any]) -> None:
    """The summary for a person."""
    summary = result["summary"]
    print(f"{'stage':<12}{'pipeline':>12}{'':>10}{'by hand':>12}{'':>10}")
    for name, row in summary["stages"].items():
        print(
            f"{name:<12}{row['pipeline_s']:>10.1f} s{row['pipeline_peak_bytes'] / 1e6:>7.0f} MB"
            f"{row['by_hand_s']:>10.1f} s{row['by_hand_peak_bytes'] / 1e6:>7.0f} MB"
        )
    print(
        f"{'whole':<12}{summary['pipeline_s']:>10.1f} s{summary['pipeline_peak_bytes'] / 1e6:>7.0f} MB"
        f"{summary['by_hand_s']:>10.1f} s{summary['by_hand_peak_bytes'] / 1e6:>7.0f} MB"
    )
    print(f"\nratio {summary['ratio']:.2f}; again, with everything fresh: {summary['again_s']:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
