"""Adversarial training and randomized smoothing on MNIST: the modules behind the scripts."""

import os

# OpenMP reads this when torch is first imported. By default its idle threads keep a core busy, and
# other work then waits: with one other process on two cores, an attack took four times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
