"""A run as the runner records it, with numbers of the size that the demo measures."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from stages.artifact import SCHEMA_VERSION

LABELS = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
STAGE_NAMES = ("finetune", "merge-lora", "export", "quantize", "validate", "package")


def digest(text: str) -> str:
    """A SHA-256 that depends on `text` only."""
    return hashlib.sha256(text.encode()).hexdigest()


def gate(
    name: str, subject: str, measured: float | None, direction: str, threshold: float, unit: str = ""
) -> dict[str, Any]:
    """A gate result, judged by the real gate."""
    from stages.gate import Gate

    assert direction in ("at most", "at least")
    return Gate(name, direction, threshold, unit).check(subject, measured).to_dict()  # type: ignore[arg-type]


def stage(
    name: str,
    duration_s: float,
    memory: int,
    measurements: dict[str, Any],
    gates: list[dict[str, Any]],
    notes: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A stage that ran."""
    consumed = {"merge-lora": 1, "export": 2, "quantize": 3, "validate": 4, "package": 5}.get(name, 0)
    return {
        "name": name,
        "status": "ran",
        "reason": "there is no result yet",
        "error": None,
        "digest": digest(name),
        "inputs": {upstream: digest(upstream) for upstream in STAGE_NAMES[max(0, consumed - 1) : consumed]},
        "duration_s": duration_s,
        "peak_memory_bytes": memory,
        "gates": gates,
        "measurements": measurements,
        "notes": list(notes),
    }


def history() -> list[dict[str, Any]]:
    """Six epochs that converge."""
    return [
        {
            "epoch": epoch,
            "train_loss": round(0.34 + 0.62 * math.exp(-0.7 * epoch), 4),
            "validation_loss": round(0.43 + 0.3 * math.exp(-0.6 * epoch) + 0.006 * max(0, epoch - 4), 4),
            "validation_metric": round(0.862 - 0.06 * math.exp(-0.6 * epoch) - 0.004 * max(0, epoch - 5), 4),
            "seconds": 21.4,
        }
        for epoch in range(1, 7)
    ]


def confusion(labels: tuple[str, ...] = LABELS) -> list[list[int]]:
    """A hundred examples a class; shirts are taken for T-shirts, pullovers and coats."""
    size = len(labels)
    matrix = [[100 if row == column else 0 for column in range(size)] for row in range(size)]
    for true, predicted, count in (
        (6, 0, 17),
        (6, 2, 11),
        (6, 4, 9),
        (0, 6, 12),
        (2, 4, 9),
        (2, 6, 8),
        (4, 2, 10),
        (4, 6, 7),
        (3, 0, 4),
        (3, 4, 3),
        (7, 9, 5),
        (5, 7, 4),
        (9, 7, 4),
        (8, 6, 1),
        (1, 3, 1),
    ):
        if max(true, predicted) < size:
            matrix[true][predicted] += count
            matrix[true][true] -= count
    return matrix


def candidate(
    name: str, precision: str, accuracy: float, error: float, p50: float, size: int, passed: bool = True
) -> dict[str, Any]:
    """What validate measures of one candidate, against a reference of .857 and 24.6 ms."""
    edges = [
        10.0**power
        for power in (-8, -7.5, -7, -6.5, -6, -5.5, -5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1)
    ]
    centre = math.log10(error) - 0.6
    counts = [round(10_000 * 0.55 * math.exp(-((math.log10(edge) + 0.25 - centre) ** 2) / 0.4)) for edge in edges[:-1]]
    return {
        "name": name,
        "precision": precision,
        "file": f"{name}.onnx",
        "sha256": digest(name),
        "size_bytes": size,
        "metric": accuracy,
        "metric_difference": round(accuracy - 0.857, 4),
        "metric_difference_interval": [
            round(accuracy - 0.857 - 0.0004 - error * 0.004, 5),
            round(accuracy - 0.857 + 0.0004 + error * 0.004, 5),
        ],
        "agreement": round(1 - error * 0.006, 4),
        "max_abs_error": error,
        "mean_abs_error": error / 9,
        "p999_abs_error": error * 0.8,
        "cosine": 1 - error**2 / 400,
        "sqnr_db": round(52 - 20 * math.log10(error + 1e-6) - 30, 2),
        "kl": error**2 / 900,
        "latency_ms_p50": p50,
        "latency_ms_p95": round(p50 * 1.13, 3),
        "latency_ms_p90": round(p50 * 1.1, 3),
        "latency_ms_p99": round(p50 * 1.4, 3),
        "latency_bounds_ms": {"p50": round(p50 * 1.01, 3), "p90": round(p50 * 1.2, 3), "p95": None, "p99": None},
        "latency_calls": 100,
        "timed_difference": 0.0,
        "turns_ms": turns(p50),
        "throughput_per_s": round(1150 / p50, 2),
        "speedup": round(24.6 / p50, 4),
        "passed": passed,
        "excused": [],
        "digest": digest(name),
        "flip_rate": 0.004,
        "robustness": {
            "problem": "",
            "samples": 512,
            "corruptions": [
                {
                    "name": "blur",
                    "reference": 0.701,
                    "metric": 0.681,
                    "drop": 0.02,
                    "interval": [0.005, 0.035],
                    "keeps_p": 0.003,
                    "loses_p": 0.9,
                },
            ],
        },
        "ece_increase": 0.002,
        "nll_increase": -0.001,
        "slices": {
            "judged": 10,
            "too_small": 2,
            "slices": [
                {
                    "name": "label=Coat",
                    "samples": 100,
                    "reference": 0.8,
                    "drop": 0.01,
                    "interval": [-0.02, 0.04],
                    "margin": 0.05,
                    "critical": True,
                },
                {
                    "name": "label=Shirt",
                    "samples": 100,
                    "reference": 0.7,
                    "drop": 0.03,
                    "interval": [-0.01, 0.08],
                    "margin": 0.05,
                    "critical": False,
                    "adjusted_p": 0.74,
                },
            ],
        },
        "mac_shares": {"int8": 0.96, "fp32": 0.04} if precision == "int8" else {precision: 1.0},
        "not_worth_it": {},
        "error_histogram": {"edges": edges, "counts": counts},
    }


def turns(p50: float) -> list[float]:
    """The medians of ten turns."""
    return [round(p50 * (1 + 0.04 * math.sin(3.1 * turn)), 4) for turn in range(10)]


def validated() -> dict[str, Any]:
    """The measurements of validate."""
    return {
        "samples": 1000,
        "sample_size": {"margin": 0.01, "pilot": None, "pilot_flip_rate": None, "needed": 268, "samples": 1000},
        "noise_floor": {"samples": 32, "batch": 2e-7, "threads": 0.0, "fp64": 4e-7, "largest": 4e-7},
        "waivers": [],
        "objective": "latency",
        "chosen": "onnx-int8-static",
        "reference": {
            "metric": 0.857,
            "latency_ms_p50": 24.6,
            "latency_ms_p95": 28.9,
            "turns_ms": turns(24.6),
            "throughput_per_s": 44.1,
            "size_bytes": 13_612_544,
        },
        "candidates": [
            candidate("onnx-fp32", "fp32", 0.857, 2.1e-5, 9.84, 13_480_112),
            candidate("onnx-fp16", "fp16", 0.857, 6.3e-3, 10.9, 6_771_204),
            candidate("onnx-int8-static", "int8", 0.854, 1.4, 5.12, 3_642_870),
        ],
        "robustness": {
            "samples": 512,
            "corruptions": [
                {
                    "name": "blur",
                    "what": "Gaussian, 2 pixels of 224",
                    "inert": False,
                    "clean": 0.857,
                    "reference": 0.701,
                    "changed": 0.21,
                },
                {
                    "name": "jpeg",
                    "what": "quality 18",
                    "inert": True,
                    "clean": 0.857,
                    "reference": None,
                    "changed": None,
                },
            ],
        },
        "baseline": {
            "name": "fashion-mnist-1",
            "kind": "bundle",
            "candidate": "onnx-fp16",
            "sha256": digest("the last release"),
            "recorded_metric": 0.851,
            "same_test_split": True,
            "same_preprocessing": True,
            "chosen": "onnx-int8-static",
            "problem": "",
            "baseline_metric": 0.851,
            "metric": 0.854,
            "metric_difference": 0.003,
            "metric_difference_interval": [-0.004, 0.01],
            "flips": 43,
            "flip_rate": 0.043,
            "latency_ratio": 0.47,
            "latency_ratio_interval": [0.45, 0.5],
            "disturbed": False,
        },
        "labels": list(LABELS),
        "confusion": confusion(),
    }


def passing_run() -> dict[str, Any]:
    """A run of the demo that ended with a bundle."""
    measured = validated()
    gates = [
        result
        for item in measured["candidates"]
        for result in (
            gate("max_metric_drop", item["name"], 0.0 - item["metric_difference"], "at most", 0.01),
            gate("min_agreement", item["name"], item["agreement"], "at least", 0.98),
            gate("min_cosine", item["name"], item["cosine"], "at least", 0.99),
        )
    ]
    finetuned = {
        "strategy": "lora",
        "metric": "accuracy",
        "validation_metric": 0.8612,
        "constant_baseline": 0.1,
        "constant": "majority class",
        "probe_validation_metric": 0.846,
        "best_epoch": 5,
        "advice": ["these data are far from what the backbone learned from. Unfreeze more: lp-ft"],
        "cost": {
            "estimated": {"trainable_parameters": 612_298, "total_parameters": 4_030_706, "flops": 8_100_000_000_000,
                          "seconds": 83.0, "step_seconds": 0.41, "peak_memory_bytes": 1_900_000_000, "batch_size": 32,
                          "epochs": 5, "processes": 1, "device": "cpu", "problem": ""},
            "actual": {"trainable_parameters": 612_298, "epochs": 5, "seconds": 92.0,
                       "peak_memory_bytes": 2_040_000_000},
        },
        "trainable_parameters": 612_298,
        "total_parameters": 4_030_706,
        "gain_over_probe": {"difference": 0.0152, "low": 0.002, "high": 0.029, "confidence": 0.95},
        "backbone_learning_rates": [3e-4, 3e-4],
        "head_learning_rate": 1e-3,
        "history": history(),
        "seconds": {"frozen": 9.0, "training": 132.2},
        "ladder": [
            {"strategy": "feature-extraction", "validation_metric": 0.846, "seconds": 9.0, "gain": None, "kept": True,
             "reason": "the start"},
            {"strategy": "lora", "validation_metric": 0.8612, "seconds": 132.2, "kept": True, "reason": "+1.5 points",
             "gain": {"difference": 0.0152, "low": 0.002, "high": 0.029, "confidence": 0.9}},
            {"strategy": "lp-ft", "validation_metric": None, "seconds": 3.0, "gain": None, "kept": False,
             "reason": "training diverged; lora is kept"},
        ],
        "against_raw": {
            "curve": [{"examples": 111, "frozen": 0.70, "raw": 0.66}, {"examples": 1000, "frozen": 0.846, "raw": 0.80}],
            "gain": {"difference": 0.046, "low": 0.02, "high": 0.07, "confidence": 0.95}, "warning": "",
        },
        "against_scratch": [
            {"examples": 250, "tuned": 0.81, "scratch": 0.41, "gain": None},
            {"examples": 1000, "tuned": 0.8612, "scratch": 0.71,
             "gain": {"difference": 0.1512, "low": 0.12, "high": 0.18, "confidence": 0.95}},
        ],
        "quantization_aware": {
            "epochs": 1, "learning_rate": 2e-5, "layers": 50, "kept": True, "history": [], "diverged": None,
            "float_metric": {"before": 0.8612, "after": 0.8604}, "int8_metric": {"before": 0.7957, "after": 0.8391},
        },
        "learning_rate_test": {
            "curve": [[0.01, 2.3], [0.1, 1.9], [1.0, 0.8], [10.0, 1.7]], "lowest": 1.0, "proposed": 0.1, "warning": "",
        },
        "layer_rates": [
            {"layer": "head", "rate": 1e-3, "trained": 12_810, "parameters": 12_810},
            {"layer": "blocks.1.0", "rate": 3e-4, "trained": 9_000, "parameters": 120_000},
            {"layer": "stem", "rate": 0.0, "trained": 0, "parameters": 1_000},
        ],
        "forgetting": [
            {"layer": "stem", "cka": 1.0, "movement": 0.0},
            {"layer": "blocks.1.0", "cka": 0.83, "movement": 0.021},
        ],
    }  # fmt: skip
    quantized = {
        "samples": 256,
        "candidates": [
            {
                "name": "onnx-int8-static",
                "accepted": True,
                "reason": "",
                "metric": 0.858,
                "metric_name": "accuracy",
                "reference_metric": 0.861,
                "narrow": "INT8",
                "narrow_share": 0.96,
                "mac_shares": {"int8": 0.96, "fp32": 0.04},
                "float_modules": ["blocks.1.0.conv_dw"],
                "tried": [
                    {"float_nodes": 0, "metric": 0.83, "agreement": 0.936, "narrow_share": 1.0},
                    {"float_nodes": 1, "metric": 0.858, "agreement": 0.98, "narrow_share": 0.96},
                ],
                "sensitivity": [
                    {"node": "Conv_12", "module": "blocks.1.0.conv_dw", "harm": 0.0953, "mac_share": 0.04},
                    {"node": "Conv_10", "module": "conv_stem", "harm": 0.0021, "mac_share": 0.03},
                ],
                "repairs": [
                    {"repair": "smooth", "places": 0, "error_before": 1.3, "error_after": 1.3, "kept": False},
                    {
                        "repair": "bias-correction",
                        "places": 50,
                        "error_before": 1.3,
                        "error_after": 0.846,
                        "kept": True,
                    },
                ],
            },
            {
                "name": "onnx-int8-dynamic",
                "accepted": False,
                "reason": "accuracy fell 3.4 points on the validation split; its budget is 1.0 point",
                "metric": 0.827,
                "reference_metric": 0.861,
            },
        ],
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "run": "fashion-mnist",
        "status": "passed",
        "created_at": "2026-11-24T02:44:10+00:00",
        "task": "image-classification",
        "backbone": "timm:tf_efficientnet_lite0",
        "config": {
            "task": "image-classification",
            "backbone": "timm:tf_efficientnet_lite0",
            "data": {"source": "demo:fashion-mnist"},
            "seed": 0,
            "finetune": {"strategy": "lora", "epochs": 6},
        },
        "stages": [
            stage(
                "finetune",
                148.2,
                1_610_000_000,
                finetuned,
                [gate("min_gain_over_majority", "network", 0.7612, "at least", 0.05)],
            ),
            stage(
                "merge-lora",
                6.4,
                1_120_000_000,
                {"passed_through": False, "max_abs_error": 3.1e-6},
                [gate("max_merge_error", "network", 3.1e-6, "at most", 1e-4)],
            ),
            stage(
                "export",
                31.7,
                1_480_000_000,
                {"opset": 20},
                [gate("max_abs_error", "onnx-fp32", 2.1e-5, "at most", 1e-3)],
            ),
            stage(
                "quantize",
                22.9,
                1_050_000_000,
                quantized,
                [],
                ("onnx-int8-dynamic was left out: accuracy fell 3.4 points; its budget is 1.0 point",),
            ),
            stage(
                "validate",
                41.3,
                1_210_000_000,
                measured,
                gates,
                ("This test split sees drops of 1.6 points or more (power 90%).",),
            ),
            stage(
                "package",
                3.8,
                640_000_000,
                {"bundle": "bundle", "tar": "fashion-mnist.tar", "size_bytes": 4_120_000, "sha256": digest("tar")},
                [],
            ),
        ],
        "report": "report.html",
        "bundle": "package/bundle",
        "environment": {
            "versions": {
                "torch": "2.13.0",
                "timm": "1.0.20",
                "onnx": "1.23.2",
                "onnxruntime": "1.31.0",
                "numpy": "2.3.4",
            },
            "hardware": {
                "system": "Linux",
                "machine": "x86_64",
                "processor": "Example Processor 3.0 GHz",
                "cores": 2,
                "memory_bytes": 16_777_216_000,
                "python": "3.12.4",
            },
        },
    }


def not_run(name: str) -> dict[str, Any]:
    """A stage behind one that failed."""
    return {
        "name": name,
        "status": "not-run",
        "reason": "",
        "error": None,
        "digest": None,
        "duration_s": None,
        "peak_memory_bytes": None,
        "gates": [],
        "measurements": {},
        "notes": [],
    }


def broken_run(
    error: str = "export: operator aten::foo is not supported\nexpected an operator of opset 20; try another backbone",
) -> dict[str, Any]:
    """A run whose export failed."""
    run = passing_run()
    stages = run["stages"][:2] + [not_run(name) for name in STAGE_NAMES[2:]]
    stages[2] |= {"status": "failed", "reason": "there is no result yet", "error": error}
    return run | {"status": "failed", "stages": stages, "bundle": None}


def gate_failed_run() -> dict[str, Any]:
    """A run whose INT8 candidate drops too far: validate ran, package did not."""
    run = passing_run()
    measured = run["stages"][4]["measurements"]
    measured["candidates"][2] |= candidate("onnx-int8-static", "int8", 0.823, 4.4, 5.12, 3_642_870, passed=False)
    run["stages"][4]["gates"][6] = gate("max_metric_drop", "onnx-int8-static", 0.034, "at most", 0.01)
    run["stages"][4]["status"] = "gate-failed"
    run["stages"][5] = not_run("package")
    return run | {"status": "gate-failed", "bundle": None}
