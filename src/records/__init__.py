"""Certificates on disk: recorded, resumed, verified, merged and drawn again."""

from src.records.merging import merge
from src.records.recording import record_certificates
from src.records.rows import read_rows, verify

__all__ = ["certify_dataset", "merge", "read_rows", "record_certificates", "redraw", "verify"]


def __getattr__(name: str):
    # Imported when asked for, because these need torch and the rest does not.
    if name == "certify_dataset":
        from src.records.certify import certify_dataset

        return certify_dataset
    if name == "redraw":
        from src.records.redrawing import redraw

        return redraw
    raise AttributeError(f"src.records has no {name!r}.")
