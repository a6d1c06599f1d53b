"""Checks of numbers and arrays of numbers; every error names the argument (no torch)."""

import numpy as np


def check_open_unit(name, value):
    """`value` as float64. Raises ValueError unless every element lies in (0, 1)."""
    value = np.asarray(value, dtype=np.float64)
    if not np.all((value > 0) & (value < 1)):
        raise ValueError(f"'{name}' must lie strictly between 0 and 1.")
    return value


def check_positive(name, value):
    """`value` as float64. Raises ValueError unless every element is positive and finite."""
    value = np.asarray(value, dtype=np.float64)
    if not np.all((value > 0) & np.isfinite(value)):
        raise ValueError(f"'{name}' must be a positive, finite number.")
    return value


def check_whole(name, value):
    """`value` as int64. Raises ValueError unless every element is whole and at least 0."""
    value = np.asarray(value)
    numeric = value.dtype.kind in "iuf"
    if not numeric or not np.all((value >= 0) & (value < 2**53) & (value == np.floor(value))):
        raise ValueError(f"'{name}' must be a whole number of at least 0.")
    return value.astype(np.int64)


def check_counts(successes, trials):
    """Both as int64 of one shape. Raises ValueError unless 0 <= `successes` <= `trials`."""
    successes, trials = np.broadcast_arrays(
        check_whole("successes", successes), check_whole("trials", trials)
    )
    if np.any(successes > trials):
        raise ValueError("'successes' must not exceed 'trials'.")
    return successes, trials


def check_unit(name, value):
    """`value` as float64. Raises ValueError if any element lies outside [0, 1]; NaN is allowed."""
    value = np.asarray(value, dtype=np.float64)
    if np.any((value < 0) | (value > 1)):
        raise ValueError(f"'{name}' must lie in [0, 1].")
    return value
