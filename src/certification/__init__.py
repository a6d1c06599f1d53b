"""Bounds, radii, stopping rules and intervals behind every certificate (numpy and scipy only)."""

from src.certification.bounds import (
    abstain_p_value,
    certified_radius,
    lower_confidence_bound,
    maximum_radius,
    minimum_successes,
    minimum_trials,
    required_probability,
    two_sided_radius,
    upper_confidence_bound,
)
from src.certification.intervals import (
    accuracy_interval,
    average_certified_radius,
    certified_accuracy,
    median_interval,
    population_certified_accuracy_interval,
    possibly_certified,
)
from src.certification.stopping import (
    CERTIFY,
    CONTINUE,
    REJECT,
    look_schedule,
    mixture_decision,
    mixture_log_e_value,
)
from src.certification.tightest import ONE_SIDED, TWO_SIDED, choose_test, tight_radius
