# `make help` lists the targets. Every target sets up what it needs. `make pocket` and `make test` need only Python >= 3.11 and a
# package index.
#
# RUNNER is put before every `python`. The default is the virtual environment .venv. If an environment has torch already (Kaggle,
# a container), `make RUNNER= ...` installs into it instead. It leaves the torch there as it is.
PYTHON ?= python3
RUNNER ?= env VIRTUAL_ENV="$(CURDIR)/.venv" PATH="$(CURDIR)/.venv/bin:$(PATH)"
CONFIG ?= configs/sft_qwen05b.yaml
ARGS ?=
RUN = $(RUNNER) python

ifeq ($(strip $(RUNNER)),)
STAMP = outputs/.installed
# The folder may outlive the packages, if a notebook's machine was replaced. So the environment is asked too, not only the stamp.
$(shell cd / && python -c 'import atlas' 2>/dev/null || rm -f "$(CURDIR)/$(STAMP)")
else
STAMP = .venv/.installed
endif

.PHONY: help setup pocket lessons lessons-dpo shares sft-if test test-slow test-notebook lint sanity sft sft-smoke dpo dpo-smoke all data audit eval compare winrate config preflight bench speed factory growth generate gpu kill strategies scaling layers matrix figures picture notebooks docs release clean

help:                   ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)         ## make the environment .venv with everything in it

# Exact tested versions. The index decides whether torch is the CPU or the CUDA build.
.venv/.installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "atlas needs Python >= 3.11: make setup PYTHON=python3.11")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[eval,dev,docs]'
	@touch $@

# The torch that is here stays, because it is built for this machine's driver. PEFT refuses to run with a torchao older than 0.16.
# Images contain one, and atlas does not use it.
outputs/.installed: pyproject.toml
	@mkdir -p outputs
	python -m pip freeze | grep -iE '^(torch|torchvision|torchaudio)==' > outputs/.torch-constraints.txt || true
	python -m pip install --quiet --disable-pip-version-check -c outputs/.torch-constraints.txt -e '.[eval,wandb]'
	python -c 'import sys; from importlib.metadata import version as v; sys.exit(tuple(map(int, v("torchao").split(".")[:2])) < (0, 16))' \
	  2>/dev/null || python -m pip uninstall --quiet -y torchao
	@touch $@

pocket: setup           ## the pocket lab on two CPU cores: base model, audit, SFT, IFEval of base and tuned, comparison, report
	$(RUN) -m atlas.pocket.lab $(ARGS)

lessons: setup          ## five lessons of the recipe on the pocket lab, each with a verdict (about 20 minutes)
	$(RUN) benchmarks/lessons.py $(ARGS)

lessons-dpo: setup      ## wrong ways to begin DPO, as numbers on the pocket lab (about two minutes)
	$(RUN) benchmarks/lessons_dpo.py

shares: setup           ## five shares of rows with checkable constraints on the pocket lab: which one is enough? (about 10 minutes)
	$(RUN) benchmarks/shares.py

sanity: setup           ## a few steps of the run, and what they prove: a verdict line each (about a minute on the pocket lab)
	$(RUN) -m atlas.train.sanity --config $(CONFIG) $(ARGS)

sft-smoke: sanity       ## the sanity check, then 50 steps of the real run; nothing is pushed
	$(RUN) -m atlas.train.sft --config $(CONFIG) --max-steps 50 --no-push-to-hub --resume never $(ARGS) output.dir=outputs/sft_smoke

sft: setup              ## the whole run; pushes to output.hub_repo if it is set
	$(RUN) -m atlas.train.sft --config $(CONFIG) $(ARGS)

dpo-smoke dpo: CONFIG = configs/dpo_qwen05b.yaml
dpo-smoke: setup        ## 50 steps of DPO from the newest SFT adapter in outputs/; nothing is pushed
	$(RUN) -m atlas.train.dpo --config $(CONFIG) --max-steps 50 --no-push-to-hub --resume never $(ARGS) output.dir=outputs/dpo_smoke

dpo: setup              ## the whole run of DPO, after `make sft`; pushes to output.hub_repo if it is set
	$(RUN) -m atlas.train.dpo --config $(CONFIG) $(ARGS)

all: CONFIG = configs/pipeline_qwen05b.yaml
all: setup              ## SFT, then DPO, scored and compared; what is finished is skipped, what was broken off resumes
	$(RUN) -m atlas.pipeline --config $(CONFIG) $(ARGS)

sft-if: setup           ## plain UltraChat and a share of rows with checkable constraints, both scored on IFEval and compared
	$(RUN) -m atlas.pipeline --config configs/pipeline_qwen05b_if.yaml $(ARGS)
	$(RUN) -m atlas.eval.compare sft_qwen05b sft_qwen05b_if

preflight: setup        ## check in seconds what would make the run fail later
	$(RUN) -m atlas.train.preflight --config $(CONFIG) $(ARGS)

data: setup             ## what the config trains on: rows used, cut, dropped, held out
	$(RUN) -m atlas.cli data --config $(CONFIG) $(ARGS)

audit: setup            ## what will be trained, token by token; loads no model
	$(RUN) -m atlas.train.sft --config $(CONFIG) --dump-template-audit $(ARGS)

eval: setup             ## score the adapter in output.dir with lm-eval (ARGS=--base: its base model)
	$(RUN) -m atlas.eval.run --config $(CONFIG) $(ARGS)

compare: setup          ## is a gain luck? ARGS="A B": names of runs in results/metrics.json
	$(RUN) -m atlas.eval.compare $(ARGS)

winrate: setup          ## which of two models answers better? ARGS="A B --prompts FILE": adapters, runs or models, and a judge
	$(RUN) -m atlas.eval.winrate $(ARGS)

config: setup           ## print the config with the source of each value
	@$(RUN) -m atlas.train.sft --config $(CONFIG) --print-config $(ARGS)

bench: setup            ## benchmarks of audit, preparation (ROWS, TOKENIZER: also on real data), training at toy size
	$(RUN) benchmarks/audit.py
	$(RUN) benchmarks/prepare.py --count 20000
	$(RUN) benchmarks/prepare.py --million
	$(RUN) benchmarks/speed.py
	$(if $(ROWS),$(RUN) benchmarks/audit.py --rows $(firstword $(ROWS)) --tokenizer $(TOKENIZER))
	$(if $(ROWS),$(RUN) benchmarks/prepare.py --rows $(ROWS) --tokenizer $(TOKENIZER))

# With ROWS and TOKENIZER: real rows on the exact shape of Qwen2.5-0.5B.
REAL = $(if $(ROWS),--shape qwen05b --rows $(ROWS) --tokenizer $(TOKENIZER))

speed: setup            ## benchmark: atlas against stock TRL (LLaMA-Factory after `make factory`; ARGS="--phase dpo": on pairs)
	$(RUN) benchmarks/speed.py $(REAL) $(ARGS)

growth: setup           ## benchmark: time and memory against rows, length, batch, model; 5,000 pocket steps stay flat
	$(RUN) benchmarks/growth.py $(if $(ROWS),--rows $(ROWS) --tokenizer $(TOKENIZER)) $(ARGS)

generate: setup         ## benchmark: replies for an evaluation, against lm-eval's own (needs the adapter of `make pocket`)
	$(RUN) benchmarks/generate.py $(ARGS)

gpu: setup              ## benchmark of one GPU: batching, precision, checkpointing, attention, LM heads; TRL and Unsloth
	$(RUN) benchmarks/gpu.py $(REAL) $(ARGS)

# LLaMA-Factory pins older libraries than atlas, so it gets an environment of its own, with the torch and bitsandbytes of atlas. It
# works with this torch (`DISABLE_VERSION_CHECK=1`). torchvision and torchaudio, which it asks for, would bring another torch; text
# needs neither, and an empty module stands in for the one that is imported in any case.
factory: outputs/factory/.installed   ## LLaMA-Factory 0.9.5 in an environment of its own, for `make speed`

outputs/factory/.installed: constraints.txt
	$(PYTHON) -m venv outputs/factory
	outputs/factory/bin/python -m pip install --quiet --disable-pip-version-check $$(grep -E '^(torch|bitsandbytes)==' constraints.txt)
	outputs/factory/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llamafactory==0.9.5
	outputs/factory/bin/python -m pip install --quiet --disable-pip-version-check $$(grep -E '^(torch|bitsandbytes)==' constraints.txt) \
	  $$(outputs/factory/bin/python -c "from importlib.metadata import requires; print(*(r.replace(' ', '') for r in requires('llamafactory') if not r.startswith(('torchvision', 'torchaudio'))))")
	touch "$$(outputs/factory/bin/python -c 'import site; print(site.getsitepackages()[0])')/torchaudio.py"
	@touch $@

kill: setup             ## kill thirty runs with SIGKILL, resume them, compare each with a run left alone (25 minutes; ARGS="--phase dpo")
	$(RUN) benchmarks/kills.py $(ARGS)

strategies: setup       ## two processes under each strategy against one: losses, weights, resumed after SIGKILL (about 15 minutes)
	$(RUN) benchmarks/strategies.py $(ARGS)

scaling: setup          ## memory and traffic of each device on paper, and what two processes hold and how long they take (10 minutes)
	$(RUN) benchmarks/scaling.py $(ARGS)

layers: setup           ## for maintainers: the matrix of imports in docs/architecture.md
	$(RUN) benchmarks/layers.py

matrix: setup           ## the audit's verdict on every chat template that TRL ships
	$(RUN) benchmarks/matrix.py

figures: setup          ## for maintainers: copy what was measured here into figures/, and renew the tables of README and docs
	$(RUN) benchmarks/tables.py --collect

# The picture of the report is that of `make pocket ARGS="data.eval_rows=200 train.eval_strategy=steps train.eval_steps=25 train.logging_steps=5"`.
BROWSER = chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$$(mktemp -d)"
picture: outputs/pocket/results/sft_template_audit.html outputs/pocket/sft/report.html   ## for maintainers: make the pictures of README and docs with Chromium
	$(BROWSER) --window-size=1000,700 --screenshot=docs/img/audit.png "file://$(CURDIR)/$<"
	$(BROWSER) --window-size=1200,1300 --screenshot=docs/img/report.png "file://$(CURDIR)/$(word 2,$^)"

notebooks: setup        ## for maintainers: make the notebooks from their sources; those of the pocket lab run
	$(RUN) benchmarks/notebooks.py

docs: setup             ## build the documentation in site/; a broken link or anchor fails
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

release:                ## for maintainers: build wheel and sdist, check them, try them in a new environment; uploads nothing
	$(PYTHON) scripts/release.py

# One thread per worker. With two workers on two cores, more threads only wait for each other.
test: setup             ## lint and all tests, offline, on the CPU
	$(MAKE) lint
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) -m pytest -n 2 --dist loadgroup -m "not slow" $(ARGS)

# An environment with the versions of Colab's image. The notebooks have to install atlas in it (2 GB, some minutes).
outputs/colab-image/.built: tests/colab_image.txt
	rm -rf outputs/colab-image
	$(PYTHON) -m venv outputs/colab-image
	outputs/colab-image/bin/python -m pip install --quiet -r $<
	@touch $@

test-notebook: setup outputs/colab-image/.built   ## install and run the notebooks, in an environment like Colab's image and in an empty one
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m slow tests/repo/test_notebook.py $(ARGS)

test-slow: setup        ## the slow tests, which `make test` leaves out
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m slow $(ARGS)

lint: setup             ## ruff, mypy, and the order of the layers
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUNNER) lint-imports --no-logo --no-cache

clean:                  ## remove everything that was made here, also the runs
	rm -rf .venv outputs build dist site .pytest_cache .mypy_cache .ruff_cache
