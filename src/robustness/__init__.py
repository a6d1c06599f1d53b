"""Attacks that a figure can be trusted to, and the evaluation of a model under them."""

from src.robustness.evaluation import attack_evaluation
from src.robustness.strongest import hits_by_stage, strongest_attack, strongest_attack_stages

__all__ = ["attack_evaluation", "hits_by_stage", "strongest_attack", "strongest_attack_stages"]
