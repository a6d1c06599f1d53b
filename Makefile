# `make help` lists the targets. Variables:
# PYTHON=     the interpreter that makes the environment (3.11 or newer)
# TORCH_INDEX= an index of PyTorch builds to take torch and torchvision from (see README)
# NAME=       the model that `model` trains; it goes to models/
# MODEL=      the checkpoint that `referee` and `worst-case` attack
# BALL=       its ball, where it is not linf 0.3: BALL="--norm l2 --epsilon 2"
# PEER=       another network for `strongest`; PEERS= the published rows for `differences`
# TWO=        what starts the trainings of the best models; TWO=.venv/bin/python for one process
# OUT=        the folder for what is measured again; the committed rows stay as they are

SHELL := /bin/sh
PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
MODEL ?= models/adversarial_training.pt
BALL ?=
OUT ?= results

.PHONY: environment run test reference help model referee worst-case cures strongest n-100000 all-images ensembles \
  controls tables differences
.DELETE_ON_ERROR:

environment: $(VENV)/ready ## the Python environment in .venv, without running anything

run: $(VENV)/ready ## the environment, MNIST and the four scripts (minutes)
	$(BIN)/python -m src.mnist.files
	$(BIN)/python main_training.py
	$(BIN)/python main_adv_training.py
	$(BIN)/python main_random_smoothing.py
	$(BIN)/python main_compare.py

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: $(VENV)/ready-to-test ## the environment, lint and tests
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m src.mnist.files
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# What `model` runs for the name before _seed; the number after it is the seed.
SMOOTHING := main_random_smoothing.py --hidden 256 --learning-rate 0.005 --every 20 --n 100000
# On one GPU: make model NAME=smoothing_best_0.50 TWO=.venv/bin/python
TWO := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node=2 --
# The networks of 32-64 channels; `two_cores` with epochs for 45 minutes, also of busy cores.
WIDE := $(TWO) $(SMOOTHING) --shift 0 --channels 32 64 --training-precision bfloat16 \
  --optimizer muon
BEST_050 := $(WIDE) --sigma 0.50 --method smoothadv-consistency --consistency 2 --attack-draws 1 \
  --epsilon 0.8 --weight-decay 0.1 --warp 0.1
BEST_100 := $(WIDE) --sigma 1.00 --method confidence
GAUSSIAN := $(BIN)/python $(SMOOTHING) --shift 0 --epochs 100
RECIPE_smoothing_gaussian_0.25 := $(GAUSSIAN) --sigma 0.25
RECIPE_smoothing_gaussian_0.50 := $(GAUSSIAN) --sigma 0.50
RECIPE_smoothing_gaussian_1.00 := $(GAUSSIAN) --sigma 1.00
RECIPE_smoothing_best_0.25 := $(BIN)/python $(SMOOTHING) --shift 1 --sigma 0.25 --epochs 60 \
  --method smoothadv-consistency --consistency 2 --optimizer muon
RECIPE_smoothing_best_0.50 := $(BEST_050) --epochs 130
RECIPE_smoothing_best_1.00 := $(BEST_100) --epochs 110
RECIPE_smoothing_two_cores_0.50 := $(BEST_050) --epochs 100
RECIPE_smoothing_two_cores_1.00 := $(BEST_100) --epochs 90
RECIPE_adversarial_single_step := $(BIN)/python main_adv_training.py
RECIPE_adversarial_multi_step := $(BIN)/python main_adv_training.py --attack pgd --steps 5 \
  --channels 32 64 --training-precision bfloat16 --optimizer muon --epochs 20
RECIPE_adversarial_l2 := $(BIN)/python main_adv_training.py --norm l2 --attack pgd --steps 7 \
  --channels 24 48 --optimizer muon --epochs 24
RECIPE_standard := $(BIN)/python main_training.py
# Each is the recipe of that name but for the thresholds.
RECIPE_control_single_step := $(RECIPE_adversarial_single_step) --no-thresholds
RECIPE_control_multi_step := $(RECIPE_adversarial_multi_step) --no-thresholds
RECIPE_control_standard := $(RECIPE_standard) --thresholds 0.4 0.6
RECIPE = $(RECIPE_$(firstword $(subst _seed, ,$(NAME))))

# One that was stopped while it certified goes on with its own command and --resume.
model: $(VENV)/ready ## one committed model again, for example NAME=smoothing_best_0.50_seed1
	$(or $(RECIPE),$(error NAME=$(NAME) is none of docs/models.md)) \
	  --seed $(or $(word 2,$(subst _seed, ,$(NAME))),0) --name $(NAME) $(INTO)

REFERENCE := $(foreach sigma,0.25 0.50 1.00,smoothing_gaussian_$(sigma)) \
  $(foreach seed,"" _seed1 _seed2,smoothing_best_0.25$(seed)) \
  $(foreach seed,"" _seed1 _seed2,smoothing_best_0.50$(seed) smoothing_best_1.00$(seed)) \
  smoothing_two_cores_0.50 smoothing_two_cores_1.00 \
  $(foreach seed,"" _seed1 _seed2,adversarial_single_step$(seed) adversarial_multi_step$(seed)) \
  adversarial_l2 standard control_single_step control_multi_step control_standard

reference: $(VENV)/ready ## the committed models and their certificates again (13 hours on two cores)
	$(BIN)/python -m src.mnist.files
	for name in $(REFERENCE); do \
	  $(MAKE) model NAME=$$name INTO="--models reference/models --results reference/results" \
	    || exit 1; \
	done
	$(BIN)/python main_compare.py --every 40 --n 100000 \
	  --standard reference/models/standard.pt --smoothed reference/models/smoothing_best_0.50.pt \
	  --adversarial reference/models/adversarial_single_step.pt --results reference/results/n_100000
	$(BIN)/python -m benchmarks.published
	$(BIN)/python -m benchmarks.robust_models

referee: $(VENV)/referee ## AutoAttack and then an attack of ours on MODEL, all test images
	$(BIN)/python -m benchmarks.autoattack $(MODEL) $(BALL) \
	  --rows $(OUT)/autoattack_$(basename $(notdir $(MODEL))).csv

worst-case: $(VENV)/ready ## the worst of all our attacks on MODEL, in linf 0.3 and l2 2
	$(BIN)/python -m benchmarks.worst_case $(MODEL) --every 20 --rows $(OUT)/worst_case_linf.csv
	$(BIN)/python -m benchmarks.worst_case $(MODEL) --norm l2 --epsilon 2 --every 100 \
	  --rows $(OUT)/worst_case_l2.csv

cures: $(VENV)/referee ## nine cures of catastrophic overfitting, three seeds each (hours)
	$(BIN)/python -m benchmarks.cures --rows $(OUT)/cures.csv

strongest: $(VENV)/referee ## our attacks beside AutoAttack; PEER=FILE adds a network of others
	$(BIN)/python -m benchmarks.strongest --rows $(OUT)/strongest.csv $(if $(PEER),--peer $(PEER))

n-100000: $(VENV)/ready ## the three kinds of model side by side at n = 100,000 (hours)
	$(BIN)/python main_compare.py --every 40 --n 100000 \
	  --standard reference/models/standard.pt --smoothed reference/models/smoothing_best_0.50.pt \
	  --adversarial reference/models/adversarial_single_step.pt --results $(OUT)/n_100000

all-images: $(VENV)/ready ## the best model at sigma 0.5 certified on all 10,000 images (hours)
	$(subst --every 20,--every 1,$(BIN)/python $(subst $(TWO),,$(BEST_050))) --epochs 130 --seed 0 \
	  --name smoothing_best_0.50 --models reference/models --resume --results $(OUT)/all_images

ensembles: $(VENV)/ready ## three seeds of each best model as one network, certified (an hour)
	for sigma in 0.25 0.50 1.00; do \
	  best=reference/models/smoothing_best_$$sigma; \
	  $(BIN)/python -m src.ensemble $$best.pt $${best}_seed1.pt $${best}_seed2.pt \
	    --out models/ensemble_$$sigma.pt && \
	  $(BIN)/python main_compare.py --model ensemble=models/ensemble_$$sigma.pt --every 20 --n 100000 \
	    --results $(OUT)/ensemble_$$sigma --figures figures/ensemble_$$sigma --resume || exit 1; \
	done

controls: $(VENV)/referee ## what the thresholds give: with and without them, both balls (an hour)
	$(BIN)/python -m benchmarks.controls --rows $(OUT)/controls.csv

tables: $(VENV)/ready ## the tables of docs/results.md from the committed rows, and their figures
	$(BIN)/python -m benchmarks.robust_models
	$(BIN)/python -m benchmarks.published

differences: $(VENV)/ready ## paired differences to the published rows of others, given as PEERS=FILE
	$(BIN)/python -m benchmarks.published --peers $(PEERS)

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

# An extra that only AutoAttack needs; without its dependencies, which it never imports.
$(VENV)/referee: $(VENV)/ready
	$(PIP) --no-deps torchattacks==3.5.1
	@touch $@
