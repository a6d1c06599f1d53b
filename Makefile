# make run    the environment, MNIST and the four scripts, in order
# make test   the environment, lint and tests
# make reference  the committed models and their certificates again, about thirteen hours on two cores
# PYTHON=     the interpreter that makes the environment (3.11 or newer)
# TORCH_INDEX= an index of PyTorch builds to take torch and torchvision from (see README)

SHELL := /bin/sh
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: run test reference
.DELETE_ON_ERROR:

run: $(VENV)/ready
	$(BIN)/python -m src.mnist.files
	$(BIN)/python main_training.py
	$(BIN)/python main_adv_training.py
	$(BIN)/python main_random_smoothing.py
	$(BIN)/python main_compare.py

test: $(VENV)/ready-to-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m src.mnist.files
	$(BIN)/python -m pytest

# One that was stopped while it certified goes on with its own command and --resume.
REFERENCE := --models reference/models --results reference/results
SMOOTHING := main_random_smoothing.py --hidden 256 --learning-rate 0.005 --shift 0 \
  --every 20 --n 100000 $(REFERENCE)
TWO := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node=2 --
# The networks of 32-64 channels; `two_cores` with epochs for 45 minutes, also of busy cores.
WIDE := $(TWO) $(SMOOTHING) --channels 32 64 --training-precision bfloat16 --optimizer muon --precision int8
BEST_050 := $(WIDE) --sigma 0.50 --method smoothadv-consistency --consistency 2 --attack-draws 1 \
  --epsilon 0.8 --weight-decay 0.1 --warp 0.1
BEST_100 := $(WIDE) --sigma 1.00 --method confidence
ADVERSARIAL := $(BIN)/python main_adv_training.py $(REFERENCE)

reference: $(VENV)/ready
	$(BIN)/python -m src.mnist.files
	for sigma in 0.25 0.50 1.00; do \
	  $(BIN)/python $(SMOOTHING) --sigma $$sigma --epochs 100 \
	    --precision $$(test $$sigma = 1.00 && echo float32 || echo int16) \
	    --name smoothing_gaussian_$$sigma || exit 1; \
	done
	for seed in 0 1 2; do \
	  of=; test $$seed = 0 || of=_seed$$seed; \
	  $(BIN)/python $(SMOOTHING) --sigma 0.25 --epochs 60 --shift 1 --method smoothadv-consistency \
	    --consistency 2 --optimizer muon --precision int8 --seed $$seed \
	    --name smoothing_best_0.25$$of || exit 1; \
	done
	for seed in 0 1 2; do \
	  of=; test $$seed = 0 || of=_seed$$seed; \
	  $(BEST_050) --epochs 130 --seed $$seed --name smoothing_best_0.50$$of || exit 1; \
	  $(BEST_100) --epochs 110 --seed $$seed --name smoothing_best_1.00$$of || exit 1; \
	done
	$(BEST_050) --epochs 100 --name smoothing_two_cores_0.50
	$(BEST_100) --epochs 90 --name smoothing_two_cores_1.00
	for seed in 0 1 2; do \
	  of=; test $$seed = 0 || of=_seed$$seed; \
	  $(ADVERSARIAL) --seed $$seed --name adversarial_single_step$$of || exit 1; \
	  $(ADVERSARIAL) --seed $$seed --name adversarial_multi_step$$of \
	    --attack pgd --steps 5 --channels 32 64 --training-precision bfloat16 --optimizer muon --epochs 20 \
	    || exit 1; \
	done
	$(ADVERSARIAL) --name adversarial_l2 --norm l2 --attack pgd --steps 7 --channels 24 48 \
	  --optimizer muon --epochs 24
	$(BIN)/python main_training.py $(REFERENCE) --name standard
	$(BIN)/python main_compare.py --every 40 --n 100000 --precision int16 \
	  --standard reference/models/standard.pt --smoothed reference/models/smoothing_best_0.50.pt \
	  --adversarial reference/models/adversarial_single_step.pt --results reference/results/n_100000
	$(BIN)/python -m benchmarks.published
	$(BIN)/python -m benchmarks.robust_models

# Written last, so an environment without it was interrupted and is made anew.
$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: $(PYTHON) is older than Python 3.11; choose another with PYTHON=")'
	@test -f $@ || { echo "Making the environment in $(VENV) (torch is large, this takes minutes)"; $(PYTHON) -m venv --clear $(VENV); }
	$(if $(TORCH_INDEX),$(PIP) torch torchvision --index-url $(TORCH_INDEX))
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/ready-to-test: requirements-dev.txt $(VENV)/ready
	$(PIP) -r requirements-dev.txt
	@touch $@
