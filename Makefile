# make demo    a ready adapter on two hosts, then a task of your own, moved: make demo SENTENCE="..."
# make test    lint, format check and the quick tests, in as many processes as there are cores, four at most
# make test-slow  what takes more than ten seconds; once a week, and before a release
# make bench   what an adapter costs beside the bare host and LoRA: results/speed.md (about half an hour)
# make dist    wheel and sdist, in dist/
# make adapters  make the ready adapters anew: make adapters DATA=DIR HOSTS="SOURCE OTHERS …" [ONLY="sentiment …"]
# make docs    the documentation site, in site/; a warning is an error
# make space   make the package's canonical space anew: make space HOSTS="A B C", Hub ids or folders
# Each target sets up what it needs in .venv; PYTHON=python3.12 chooses another interpreter (3.11 or newer).

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
export SENTENCE ?=

.PHONY: demo test test-slow docs bench dist adapters space lint clean

demo: $(VENV)/.installed-demo
	HF_HUB_OFFLINE=1 $(RUN) scripts/demo.py $(if $(SENTENCE),--sentence "$$SENTENCE")

test: lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile

test-slow: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m slow

# The variable silences a notice of mkdocs-material on its successor, Zensical.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# BENCH_HOSTS: Hub ids or folders; the first is measured in everything. ADAPTER: a trained tagger, for `start`.
HOSTS ?=
ADAPTER ?=
BENCH_HOSTS ?= sentence-transformers/all-MiniLM-L6-v2 sentence-transformers/all-mpnet-base-v2
BENCH = OMP_NUM_THREADS=1 $(RUN) -m scripts.research.benchmark
bench: $(VENV)/.installed-test
	for host in $(BENCH_HOSTS); do for what in latency train memory calibrate size; do \
	    $(BENCH) $$what --model_name_or_path $$host --output results/speed-$$what-$$(basename $$host).json || exit 1; \
	done; done
	for what in slopes parts; do \
	    $(BENCH) $$what --model_name_or_path $(firstword $(BENCH_HOSTS)) --output results/speed-$$what.json || exit 1; \
	done
	$(BENCH) many --reader small --model_name_or_path $(firstword $(BENCH_HOSTS)) --output results/speed-many.json
	$(if $(ADAPTER),$(BENCH) start --adapter $(ADAPTER) --model_name_or_path $(firstword $(BENCH_HOSTS)) \
	    --output results/speed-start.json)
	$(RUN) -m scripts.research.benchmark render

dist: $(VENV)/.installed-test
	$(RUN) -m build --outdir dist .

# The data's folder is described in scripts/research/ready_adapters.py.
DATA ?=
ONLY ?=
adapters: $(VENV)/.installed-test
	$(if $(and $(DATA),$(HOSTS)),,$(error make adapters needs data and hosts: make adapters DATA=DIR HOSTS="SOURCE OTHERS"))
	OMP_NUM_THREADS=1 $(RUN) -m scripts.research.ready_adapters --data $(DATA) --host $(firstword $(HOSTS)) \
	    --target_hosts $(wordlist 2,$(words $(HOSTS)),$(HOSTS)) $(if $(ONLY),--only $(ONLY))
	$(RUN) -m scripts.research.benchmark render

# What it was made from is written beside it, into space.safetensors.json. Give another version when the space changes.
SPACE_VERSION ?= 2
space: $(VENV)/.installed-test
	$(if $(HOSTS),,$(error make space needs the hosts that the space is made from: make space HOSTS="A B C"))
	$(RUN) -m scripts.research.make_space --hosts $(HOSTS) --name english --version $(SPACE_VERSION) \
	    --output modeling_unihyperlora/space.safetensors

lint: $(VENV)/.installed-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The stamp makes pip run again only when what it read has changed.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
