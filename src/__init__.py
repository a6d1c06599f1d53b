"""Adversarial training and randomized smoothing on MNIST: the modules behind the scripts."""

import os

# Read by OpenMP when torch is first imported. By default its idle threads spin, and on a machine
# that is busy with anything else every small operation waits for them: with one other process on
# two cores, an attack took four times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
