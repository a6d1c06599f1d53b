"""What is printed and drawn of models: tables and figures out of rows."""

from src.reports.plotting import plot_certified_accuracy

__all__ = ["plot_certified_accuracy"]
