"""Certificates on disk: written, resumed, verified, merged and drawn again."""

from src.records.certify import certify_dataset
from src.records.merging import merge
from src.records.recording import record_certificates
from src.records.redrawing import redraw
from src.records.rows import read_rows, verify

__all__ = ["certify_dataset", "merge", "read_rows", "record_certificates", "redraw", "verify"]
