# `make help` lists what there is. Every target sets up what it needs; `make pocket` and `make test` need nothing but
# Python >= 3.11 and a package index.
#
# RUNNER is put before every `python`. The default is the virtual environment .venv. In an environment that has torch already
# (Kaggle, a container) `make RUNNER= ...` installs into it, without touching its torch, and skips the virtual environment.
PYTHON ?= python3
RUNNER ?= env VIRTUAL_ENV="$(CURDIR)/.venv" PATH="$(CURDIR)/.venv/bin:$(PATH)"
CONFIG ?= configs/sft_qwen05b.yaml
ARGS ?=
RUN = $(RUNNER) python

ifeq ($(strip $(RUNNER)),)
STAMP = outputs/.installed
# This folder may outlive the packages (a notebook's machine is replaced): the environment is asked, not the stamp alone.
$(shell cd / && python -c 'import atlas' 2>/dev/null || rm -f "$(CURDIR)/$(STAMP)")
else
STAMP = .venv/.installed
endif

.PHONY: help setup pocket lessons test test-slow test-notebook lint sft sft-smoke data audit eval compare config preflight bench kill matrix figures picture docs clean

help:                   ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)         ## an environment with everything in it (.venv)

# Exact tested versions; the index decides which build of torch (CPU or CUDA) it is.
.venv/.installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "atlas needs Python >= 3.11: make setup PYTHON=python3.11")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[eval,dev]'
	@touch $@

# Whatever torch is here stays: it is built for this machine's driver. PEFT refuses to run beside a torchao before 0.16, which
# images bring along and atlas does not use.
outputs/.installed: pyproject.toml
	@mkdir -p outputs
	python -m pip freeze | grep -iE '^(torch|torchvision|torchaudio)==' > outputs/.torch-constraints.txt || true
	python -m pip install --quiet --disable-pip-version-check -c outputs/.torch-constraints.txt -e '.[eval,wandb]'
	python -c 'import sys; from importlib.metadata import version as v; sys.exit(tuple(map(int, v("torchao").split(".")[:2])) < (0, 16))' \
	  2>/dev/null || python -m pip uninstall --quiet -y torchao
	@touch $@

pocket: setup           ## base -> audit -> SFT -> IFEval of base and tuned -> gain or luck, on two CPU cores
	$(RUN) -m atlas.pocket.lab $(ARGS)

lessons: setup          ## five lessons of the recipe on the pocket lab, each with its verdict (about 15 minutes)
	$(RUN) benchmarks/lessons.py $(ARGS)

sft-smoke: setup        ## 50 steps of the real run, nothing pushed
	$(RUN) -m atlas.train.sft --config $(CONFIG) --max-steps 50 --no-push-to-hub --resume never $(ARGS) output.dir=outputs/sft_smoke

sft: setup              ## the whole run, pushed to output.hub_repo where that is set
	$(RUN) -m atlas.train.sft --config $(CONFIG) $(ARGS)

preflight: setup        ## everything that would end the run badly, in seconds
	$(RUN) -m atlas.train.preflight --config $(CONFIG) $(ARGS)

data: setup             ## what it would be trained on: rows used, cut, dropped, held out
	$(RUN) -m atlas.data.report --config $(CONFIG) $(ARGS)

audit: setup            ## what would be trained, token by token, without loading a model
	$(RUN) -m atlas.train.sft --config $(CONFIG) --dump-template-audit $(ARGS)

eval: setup             ## lm-eval's scores of the adapter in output.dir (ARGS=--base: of its base model)
	$(RUN) -m atlas.eval.run --config $(CONFIG) $(ARGS)

compare: setup          ## is it luck? ARGS="A B": names of runs in results/metrics.json
	$(RUN) -m atlas.eval.compare $(ARGS)

config: setup           ## the resolved config, each value with its source
	@$(RUN) -m atlas.train.sft --config $(CONFIG) --print-config $(ARGS)

bench: setup            ## the benchmarks, of audit and preparation (ROWS, TOKENIZER: on real ones as well)
	$(RUN) benchmarks/audit.py
	$(RUN) benchmarks/prepare.py --count 20000
	$(RUN) benchmarks/prepare.py --million
	$(if $(ROWS),$(RUN) benchmarks/audit.py --rows $(firstword $(ROWS)) --tokenizer $(TOKENIZER))
	$(if $(ROWS),$(RUN) benchmarks/prepare.py --rows $(ROWS) --tokenizer $(TOKENIZER))

kill: setup             ## thirty runs broken off with SIGKILL and resumed, against one that was left alone (about 25 minutes)
	$(RUN) benchmarks/kills.py $(ARGS)

matrix: setup           ## the audit's verdict on every template that TRL ships
	$(RUN) benchmarks/matrix.py

figures: setup          ## for maintainers: take over what was measured here into figures/, and renew the tables of README and docs
	$(RUN) benchmarks/tables.py --collect

picture: outputs/pocket/results/sft_template_audit.html   ## for maintainers: the README's picture, with Chromium
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$$(mktemp -d)" \
	  --window-size=1000,700 --screenshot=docs/img/audit.png "file://$(CURDIR)/$<"

docs: setup             ## the site, in site/
	$(RUN) -m pip install --quiet --disable-pip-version-check mkdocs-material
	$(RUN) -m mkdocs build

# One thread a worker: with two workers on two cores, more threads only wait for each other.
test: setup             ## lint and the whole suite, offline, CPU
	$(MAKE) lint
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) -m pytest -n 2 --dist loadgroup -m "not slow" $(ARGS)

# An environment with the versions of Colab's image, in which the notebook has to install atlas (2 GB, some minutes).
outputs/colab-image/.built: tests/colab_image.txt
	rm -rf outputs/colab-image
	$(PYTHON) -m venv outputs/colab-image
	outputs/colab-image/bin/python -m pip install --quiet -r $<
	@touch $@

test-notebook: setup outputs/colab-image/.built   ## the notebook, installed and run in an environment like Colab's image
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m slow tests/repo/test_notebook.py $(ARGS)

test-slow: setup        ## what `make test` leaves out
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m slow $(ARGS)

lint: setup             ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:                  ## remove everything that was made here, runs included
	rm -rf .venv outputs build site .pytest_cache .mypy_cache .ruff_cache
