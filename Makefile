# Self-improving reasoners: what can be run, and how. `make` alone lists the targets.
#
#   make irpo                         toy world, CPU: base model, IRPO beside DPO and SFT, report
#   make irpo ARGS="--alpha 0"        one run of irpo.py with these flags instead
#   make irpo TASK=gsm8k MODEL=dir    a real data set and a model directory in Hugging Face's layout
#   make irpo SEED=1                  another base model and other samples
#   make irpo GPUS=8 ...              on 8 GPUs (or, without any, by 8 processes) under torchrun
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
SEED ?= 0
TASK ?= toy
GPUS ?= 1
ARGS ?=
PY = .venv/bin/python
RUN = $(if $(filter 1,$(GPUS)),$(PY),.venv/bin/torchrun --standalone --nproc_per_node $(GPUS))
PIP = $(PY) -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
TOY = $(RUN) irpo.py --preset toy
BASE = runs/base-s$(SEED)/model
RFT = $(RUN) rft.py --preset toy
REFT = $(RUN) reft.py --preset toy

.PHONY: help setup test lint data base sft irpo irpo-table ablate-nll rft rft-pool rft-table reft reft-table reft-tune reft-sweep eval torture bench smoke report clean
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: .venv/runtime  ## virtual environment with the runtime packages and matplotlib

.venv/runtime: requirements.txt requirements-extras.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt -r requirements-extras.txt
	@touch $@

.venv/development: .venv/runtime requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

test: .venv/development  ## lint and all tests, without network once the packages are there
	$(PY) -m ruff check .
	$(PY) -m pytest -q

lint: .venv/development  ## ruff alone
	$(PY) -m ruff check .

data: setup  ## a task's data set, into downloads/TASK: make data TASK=gsm8k
	$(PY) -m data.download --task $(TASK) $(ARGS)

base: setup  ## the toy world's base model M_0, runs/base-sSEED (about 2 minutes)
	$(PY) train.py --preset base --seed $(SEED) --run_dir runs/base-s$(SEED)

# A real data set needs a model directory; the toy world makes its own, and evaluates any.
GOALS = $(filter irpo rft reft sft eval,$(MAKECMDGOALS))
ifneq ($(TASK),toy)
$(if $(MODEL),,$(if $(GOALS),$(error name a model directory: make $(firstword $(GOALS)) TASK=$(TASK) MODEL=dir)))
irpo rft reft: setup
	$(RUN) $@.py --task $(TASK) --model $(MODEL) --seed $(SEED) --run_dir runs/$@-$(TASK)-s$(SEED) $(ARGS)
	$(PY) -m tools.$(if $(filter irpo,$@),report,report_$@) runs/$@-$(TASK)-s$(SEED)
else
$(if $(and $(MODEL),$(filter-out eval sft,$(GOALS))),$(error MODEL=$(MODEL) needs TASK, such as TASK=gsm8k: the toy world makes its own))
ifneq ($(strip $(ARGS)),)
irpo reft: base
	$(RUN) $@.py --preset toy --model $(BASE) --seed $(SEED) $(ARGS)

rft: runs/rft-base-s$(SEED)/model
	$(RFT) --model $< --seed $(SEED) $(ARGS)
else
irpo: base  ## IRPO on the toy world, with plain DPO and SFT on the winners beside it
	$(TOY) --model $(BASE) --seed $(SEED) --run_dir runs/irpo-s$(SEED)
	$(TOY) --model $(BASE) --seed $(SEED) --run_dir runs/dpo-s$(SEED) --alpha 0 --eval_samples 0
	$(TOY) --model $(BASE) --seed $(SEED) --run_dir runs/sft_chosen-s$(SEED) --method sft_chosen --eval_samples 0
	$(PY) -m tools.report runs/irpo-s$(SEED) runs/dpo-s$(SEED) runs/sft_chosen-s$(SEED)

rft: $(foreach cell,k50 k6 k1 matched,runs/rft/$(cell)/s$(SEED)/results.json)  ## RFT on the toy world: SFT, k = 1, 6 and 50, and SFT for as many steps
	$(PY) -m tools.report_rft runs/rft --out runs/rft-report

reft: $(foreach cell,reft nokl sft offline_st,runs/reft/$(cell)/s$(SEED)/results.json)  ## ReFT on the toy world, with and without KL, beside SFT and offline self-training
	$(PY) -m tools.report_reft runs/reft --out runs/reft-report
endif
endif

sft: $(if $(MODEL),setup,base)  ## fine-tuning on a task's gold solutions: make sft TASK=gsm8k MODEL=dir
	$(RUN) train.py --task $(TASK) --model $(or $(MODEL),$(BASE)) --seed $(SEED) --run_dir runs/sft-$(TASK)-s$(SEED) $(ARGS)

eval: setup  ## greedy test accuracy of a model directory: make eval TASK=gsm8k MODEL=dir
	$(RUN) evaluate.py $(if $(filter toy,$(TASK)),--preset toy,--task $(TASK)) --model $(or $(MODEL),$(BASE)) $(ARGS)

torture: setup  ## SFT, IRPO and PPO killed 20 times each and run again: every file must come out the same
	$(PY) tests/torture.py --out runs/torture $(ARGS)

smoke: base  ## every step of irpo.py on forty questions, in half a minute
	$(PY) irpo.py --preset smoke --model $(BASE) --run_dir runs/smoke
	$(PY) -m tools.report runs/smoke

PEER ?= $(PY)
bench: .venv/development  ## our sampling beside transformers' generate, our training beside TRL's where PEER=PYTHON has it (30 minutes)
	$(PY) -m tools.bench --out results/bench $(ARGS)
	$(PY) -m tools.bench_train --peer_python $(PEER) --out results/bench

report: setup  ## tables and pictures of run directories: make report RUNS="runs/a runs/b"
	$(PY) -m tools.report $(RUNS)

clean:  ## remove the environment and all runs
	rm -rf .venv runs

# --- tables of many runs ------------------------------------------------------------------------
# One thread per run and two runs at a time (make -j2) use two cores better than one run with two. The base, which make irpo
# trains, too, has all threads, unless runs go side by side: two with two threads each would take ten times as long.
# All cells of a seed start from the same M_0, so they share its evaluation and its first samples:
# the files are those that each run would write itself.
SEEDS ?= 0 1 2
ONE = OMP_NUM_THREADS=1

runs/base-s%/model: | .venv/runtime
	$(if $(filter -j%,$(MAKEFLAGS)),$(ONE)) $(PY) train.py --preset base --seed $* --run_dir runs/base-s$*

# $(call run,folder,seed,flags,folder whose iter0 and first samples are shared)
define run
runs/$(1)/s$(2)/results.json: $(if $(4),runs/$(4)/s$(2)/results.json,runs/base-s$(2)/model)
	mkdir -p runs/$(1)/s$(2)/iter1
	$(if $(4),cp -r runs/$(4)/s$(2)/iter0 runs/$(1)/s$(2)/ && cp runs/$(4)/s$(2)/iter1/samples.jsonl runs/$(1)/s$(2)/iter1/)
	$(ONE) $(TOY) --model runs/base-s$(2)/model --seed $(2) --run_dir runs/$(1)/s$(2) $(3)
endef

# The paper's GSM8K table, one folder per row.
TABLE = irpo dpo sft_chosen sft_chosen_2x sft_gold dpo_from_sft_chosen irpo_from_sft_chosen irpo_2x
FROM_SFT = --iterations 1 --start_from runs/table/sft_chosen/s$(1)/iter1/model
define table_of_seed
$(call run,table/irpo,$(1),,)
$(call run,table/dpo,$(1),--alpha 0,table/irpo)
$(call run,table/sft_chosen,$(1),--method sft_chosen,table/irpo)
$(call run,table/sft_chosen_2x,$(1),--method sft_chosen --iterations 1 --pairs_per_question 8 --max_pairs 4000,table/irpo)
$(call run,table/sft_gold,$(1),--method sft_gold --iterations 1,table/irpo)
$(call run,table/irpo_2x,$(1),--iterations 1 --pairs_per_question 8 --max_pairs 4000,table/irpo)
$(call run,table/dpo_from_sft_chosen,$(1),--alpha 0 $(FROM_SFT),table/sft_chosen)
$(call run,table/irpo_from_sft_chosen,$(1),$(FROM_SFT),table/sft_chosen)
endef
$(foreach seed,$(SEEDS),$(eval $(call table_of_seed,$(seed))))

irpo-table: setup $(foreach cell,$(TABLE),$(SEEDS:%=runs/table/$(cell)/s%/results.json))  ## every row of the paper's GSM8K table on the toy world, 3 seeds: make -j2 irpo-table
	$(PY) -m tools.report --table runs/table --out results/irpo-table

# When does the NLL term matter? alpha x beta, with half of the questions and pairs and twice the rate.
ALPHAS = 0 0.25 0.5 1 2
BETAS = 0.05 0.1 0.5 1
SMALL = --iterations 3 --num_questions 500 --max_pairs 1000 --lr 1e-4 --eval_questions 400 --eval_samples 0
GRID = $(foreach alpha,$(ALPHAS),$(BETAS:%=alpha$(alpha)-beta%))
FIRST = alpha1-beta0.1
define sweep_cell
$(call run,sweep/$(1),$(2),$(SMALL) --alpha $(patsubst alpha%,%,$(firstword $(subst -, ,$(1)))) --beta $(patsubst beta%,%,$(lastword $(subst -, ,$(1)))),$(if $(filter-out $(FIRST),$(1)),sweep/$(FIRST)))
endef
$(foreach seed,$(SEEDS),$(foreach cell,$(GRID),$(eval $(call sweep_cell,$(cell),$(seed)))))

ablate-nll: setup $(foreach cell,$(GRID),$(SEEDS:%=runs/sweep/$(cell)/s%/results.json))  ## alpha x beta, 3 seeds: make -j2 ablate-nll
	$(PY) -m tools.report --sweep runs/sweep --out results/ablate-nll

# --- RFT ------------------------------------------------------------------------------------------
# runs/rft/k50/sSEED samples k = 50 paths; the other cells select from its file, or from several.
runs/rft-base-s%/model: | .venv/runtime
	$(ONE) $(PY) train.py --preset rft_base --seed $* --run_dir runs/rft-base-s$*

# other base models to pool with: width, and a seed of their own
WIDTHS = 96 160
runs/rft-base-w%/model: | .venv/runtime
	$(ONE) $(PY) train.py --preset rft_base --hidden_size $(firstword $(subst -s, ,$*)) --seed 1$(lastword $(subst -s, ,$*)) --run_dir runs/rft-base-w$*

# $(call rft_run,folder,seed,base model,flags,runs that must be there)
define rft_run
runs/rft/$(1)/s$(2)/results.json: $(3)/model $(5:%=%/results.json)
	$(ONE) $(RFT) --model $(3)/model --seed $(2) --run_dir runs/rft/$(1)/s$(2) $(4)
endef
RFT_CELLS = k1 k6 k25 matched none pool k3 k12 string first nofilter restart half quarter
GREEDY = --eval_samples 0
FROM_FILE = --pool runs/rft/k50/s$(1) $(GREEDY)
define rft_of_seed
$(call rft_run,k50,$(1),runs/rft-base-s$(1),,)
$(foreach k,1 3 6 12 25,$(eval $(call rft_run,k$(k),$(1),runs/rft-base-s$(1),$(FROM_FILE) --num_samples $(k),runs/rft/k50/s$(1))))
$(call rft_run,none,$(1),runs/rft-base-s$(1),$(FROM_FILE) --dedup none,runs/rft/k50/s$(1))
$(call rft_run,string,$(1),runs/rft-base-s$(1),$(FROM_FILE) --dedup string,runs/rft/k50/s$(1))
$(call rft_run,first,$(1),runs/rft-base-s$(1),$(FROM_FILE) --select first,runs/rft/k50/s$(1))
$(call rft_run,nofilter,$(1),runs/rft-base-s$(1),$(FROM_FILE) --no-equation_filter,runs/rft/k50/s$(1))
$(call rft_run,matched,$(1),runs/rft-base-s$(1),--pool runs/rft/k50/s$(1) --steps_matched,runs/rft/k50/s$(1))
$(call rft_run,restart,$(1),runs/rft-base-s$(1),$(FROM_FILE) --restart_from sft,runs/rft/k50/s$(1))
$(call rft_run,half,$(1),runs/rft-base-s$(1),--train_fraction 0.5 $(GREEDY),)
$(call rft_run,quarter,$(1),runs/rft-base-s$(1),--train_fraction 0.25 $(GREEDY),)
$(foreach w,$(WIDTHS),$(eval $(call rft_run,w$(w),$(1),runs/rft-base-w$(w)-s$(1),$(GREEDY),)))
$(call rft_run,pool,$(1),runs/rft-base-s$(1),--pool runs/rft/k50/s$(1) $(WIDTHS:%=runs/rft/w%/s$(1)),runs/rft/k50/s$(1) $(WIDTHS:%=runs/rft/w%/s$(1)))
endef
$(foreach seed,$(sort $(SEEDS) $(SEED)),$(eval $(call rft_of_seed,$(seed))))

rft-pool: setup runs/rft/pool/s$(SEED)/results.json  ## three small models of different width and seed, their paths pooled
	$(PY) -m tools.report_rft runs/rft --out runs/rft-report

rft-table: setup $(foreach cell,k50 $(RFT_CELLS),$(SEEDS:%=runs/rft/$(cell)/s%/results.json))  ## every row of RFT on the toy world, 3 seeds: make -j2 rft-table
	$(PY) -m tools.report_rft runs/rft --out results/rft

# --- ReFT -----------------------------------------------------------------------------------------
# runs/reft/reft/sSEED makes the warm-up model; the other cells of a seed start from copies of it.
# $(call reft_run,folder,seed,flags,folder whose iter0 is shared)
define reft_run
runs/$(1)/s$(2)/results.json: runs/base-s$(2)/model $(4:%=runs/%/s$(2)/results.json)
	mkdir -p runs/$(1)/s$(2)
	$(if $(4),cp -r runs/$(4)/s$(2)/iter0 runs/$(1)/s$(2)/)
	$(ONE) $(REFT) --model runs/base-s$(2)/model --seed $(2) --run_dir runs/$(1)/s$(2) $(3)
endef
# $(call rerank_run,method,seed): best of 8 test samples by a reward model that starts from the method's
define rerank_run
runs/reft/rerank-$(1)/s$(2)/results.json: runs/reft/$(1)/s$(2)/results.json runs/labelled-s$(2)/eval_samples.jsonl
	$(ONE) $(PY) -m tools.rerank --preset toy --model runs/reft/$(1)/s$(2)/iter1/model --labelled runs/labelled-s$(2)/eval_samples.jsonl --candidates runs/reft/$(1)/s$(2)/iter1/eval_sampled.jsonl --seed $(2) --run_dir runs/reft/rerank-$(1)/s$(2)
endef
runs/labelled-s%/eval_samples.jsonl: runs/reft/reft/s%/results.json
	$(ONE) $(PY) evaluate.py --preset toy --model runs/reft/reft/s$*/iter0/model --split train --limit 1000 --num_samples 8 --temperature 1 --seed $* --run_dir runs/labelled-s$*

REFT_CELLS = reft nokl sft offline_st online_st group nopartial separate letters rerank-reft rerank-sft
define reft_of_seed
$(call reft_run,reft/reft,$(1),--eval_samples 8,)
$(call reft_run,reft/sft,$(1),--eval_samples 8 --method sft --sft_lr 2e-4 --sft_epochs 10,reft/reft)
$(call reft_run,reft/nokl,$(1),--kl_coef 0,reft/reft)
$(call reft_run,reft/offline_st,$(1),--method offline_st --sft_lr 2e-5,reft/reft)
$(call reft_run,reft/online_st,$(1),--method online_st --lr 1e-5,reft/reft)
$(call reft_run,reft/group,$(1),--advantage group --num_samples 4 --batch_size 32,reft/reft)
$(call reft_run,reft/nopartial,$(1),--partial_reward 0,reft/reft)
$(call reft_run,reft/separate,$(1),--critic separate,reft/reft)
$(call reft_run,reft/letters,$(1),--num_choices 2,reft/reft)
$(call rerank_run,reft,$(1))
$(call rerank_run,sft,$(1))
endef
$(foreach seed,$(sort $(SEEDS) $(SEED)),$(eval $(call reft_of_seed,$(seed))))

reft-table: setup $(foreach cell,$(REFT_CELLS),$(SEEDS:%=runs/reft/$(cell)/s%/results.json))  ## every row of ReFT on the toy world, 3 seeds: make -j2 reft-table
	$(PY) -m tools.report_reft runs/reft --out results/reft

# A cell of the two below is named by its flags: reft+gae_lambda@0.5 is --method reft --gae_lambda 0.5.
flags_of = --method $(subst @, ,$(subst +, --,$(1)))

# Settings of the baselines, on one seed; the table's flags are those with the best dev accuracy.
TUNE = $(foreach lr,2e-5 5e-5 1e-4 2e-4 5e-4,sft+sft_lr@$(lr)+sft_epochs@10) $(foreach lr,5e-5 2e-4,sft+sft_lr@$(lr)+sft_epochs@2)
TUNE += $(foreach lr,1e-5 2e-5 5e-5 2e-4,offline_st+sft_lr@$(lr)+sft_epochs@2)
TUNE += $(foreach lr,1e-5 3e-5 1e-4 3e-4,online_st+lr@$(lr))
$(foreach cell,$(TUNE),$(eval $(call reft_run,reft-tune/$(cell),0,$(call flags_of,$(cell)),reft/reft)))

reft-tune: setup $(TUNE:%=runs/reft-tune/%/s0/results.json)  ## learning rates and epochs of ReFT's baselines, chosen on dev of seed 0
	$(PY) -m tools.report_reft runs/reft-tune --out results/reft/tune

# The warm-up's length and lambda, around the cell of the table.
WARM = $(foreach epochs,1 4 8,reft+warmup_epochs@$(epochs))
LAMBDAS = $(foreach lambda,0 0.5 1,reft+gae_lambda@$(lambda))
$(foreach seed,$(SEEDS),$(foreach cell,$(WARM),$(eval $(call reft_run,reft-sweep/$(cell),$(seed),$(call flags_of,$(cell)),))))
$(foreach seed,$(SEEDS),$(foreach cell,$(LAMBDAS),$(eval $(call reft_run,reft-sweep/$(cell),$(seed),$(call flags_of,$(cell)),reft/reft))))

reft-sweep: setup $(foreach cell,$(WARM) $(LAMBDAS),$(SEEDS:%=runs/reft-sweep/$(cell)/s%/results.json)) $(SEEDS:%=runs/reft/reft/s%/results.json)  ## ReFT over epochs of warm-up and over lambda, 3 seeds: make -j2 reft-sweep
	ln -sfn ../reft/reft runs/reft-sweep/reft
	$(PY) -m tools.report_reft runs/reft-sweep --out results/reft/sweep
