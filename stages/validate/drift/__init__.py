"""Where the error comes from: step by step between the artifacts, then node by node in the graph."""

from stages.validate.drift.waterfall import DriftSetup, drift_findings, measure_drift

__all__ = ["DriftSetup", "drift_findings", "measure_drift"]
