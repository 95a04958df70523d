# The two commands of the README are `make demo` and `make test`; each prepares what it needs.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$p && break; done)
export PROMPT ?= a large blue ring on a brown background
export PATH := $(CURDIR)/.venv/bin:$(PATH)
CHECKPOINT := checkpoints/scenes-64
# `make demo` and `make serve` need the server, the gateway and the export alone.
INSTALLED := .venv/.installed
DEVELOPED := .venv/.developed
EXPORTED := model_repository/MANIFEST.json
CHECKED := twinbrush networks export training client gateway benchmarks examples tests backends model_repository

.PHONY: demo test test-all serve bench perf-analyzer lint clean

demo: $(EXPORTED)
	@python -m twinbrush.server --http-port 0 --grpc-port 0 --metrics-port 0 \
		--then 'twinbrush generate "$$PROMPT"'

# Processes of one thread, because torch.export uses one; some tests wait for servers meanwhile.
# Files run in the order of conftest.py. A process that dies fails the run and is not replaced:
# the run would wait for ever for one that is replaced at the end.
PYTEST := OMP_NUM_THREADS=1 python -m pytest -n 3 --dist loadfile --no-loadscope-reorder \
	--max-worker-restart 0

test: $(EXPORTED) $(DEVELOPED)
	$(PYTEST)

test-all: $(EXPORTED) $(DEVELOPED)
	$(PYTEST) -m "slow or not slow"

# Triton and, beside it, the gateway on http://127.0.0.1:8080; Ctrl-C ends both.
serve: $(EXPORTED)
	@python -m twinbrush.server --then 'exec python -m gateway'

# The documents as a site, in site/. Without npm, diagrams stay text.
docs: $(DEVELOPED)
	@! command -v npm > /dev/null || npm ci --silent --prefix docs
	mkdocs build --strict --quiet

bench: $(EXPORTED) $(DEVELOPED)
	python -m benchmarks.overhead

perf-analyzer: $(INSTALLED)
	python -m benchmarks.perf_analyzer.binary

lint: $(DEVELOPED)
	ruff check $(CHECKED)
	ruff format --check $(CHECKED)
	pyright
	lint-imports
	hadolint Dockerfile

clean:
	rm -rf .venv output model_repository/MANIFEST.json
	git clean -fdXq model_repository

# Without byte code, most of which would never be read: Python writes that of what it imports,
# also where the environment forbids it: every process would compile PyTorch again.
unexport PYTHONDONTWRITEBYTECODE
$(INSTALLED): requirements/serve.txt requirements/export.txt requirements/gateway.txt pyproject.toml client/pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/it"; exit 1; }
	$(PYTHON) -m venv .venv
	pip install --quiet --no-compile --requirement requirements/export.txt --requirement requirements/gateway.txt
	pip install --quiet --no-deps --editable . --editable client
	@touch $@

$(DEVELOPED): $(INSTALLED) $(wildcard requirements/*.txt)
	pip install --quiet --no-compile --requirement requirements/dev.txt
	pip install --quiet --no-compile --no-deps --requirement requirements/page.txt
	@touch $@

$(EXPORTED): $(INSTALLED) $(wildcard export/*.py networks/*.py) $(wildcard $(CHECKPOINT)/*/*) $(CHECKPOINT)/model_index.json
	@python -m export $(CHECKPOINT)
