"""export: the merged network as ONNX, proven at other shapes, and as engines."""

from stages.export.stage import Export, ExportConfig

__all__ = ["Export", "ExportConfig"]
