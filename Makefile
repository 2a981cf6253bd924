# Every target sets up $(VENV) first, anew when its requirements or the C sources change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(PYTHON) -m pip --disable-pip-version-check --python $(BIN)/python
STUBS := $(VENV)/stubs
PROMTOOL := $(BIN)/promtool

# pip's PyTorch for Linux is the CUDA build, several GB. uv looks for a GPU and takes the build that fits, from PyTorch's
# own index: CPU where there is none. Set to cpu, cu130, ... to choose. Where that fails, pip picks.
export UV_TORCH_BACKEND ?= auto

.PHONY: demo test check protos bench soak fuzz examples

demo: $(READY)
	$(BIN)/weft demo

test: $(READY) $(PROMTOOL)
	$(BIN)/pytest

bench: $(READY)
	$(BIN)/python benchmarks/side_by_side.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/slora.py
	$(BIN)/python benchmarks/adapters.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/speculation.py
	$(BIN)/python benchmarks/prefixes.py
	$(BIN)/python benchmarks/classify.py
	$(BIN)/python benchmarks/bottlenecks.py
	$(BIN)/python benchmarks/fairness.py
	$(BIN)/python benchmarks/constraints.py
	$(BIN)/python benchmarks/access.py
	$(BIN)/python benchmarks/overload.py
	$(BIN)/python benchmarks/streams.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/extracting.py
	$(BIN)/python benchmarks/shared_basis.py

# Minutes; SOAK="--minutes 120" for hours.
soak: $(READY)
	$(BIN)/python benchmarks/soak.py $(SOAK)

# The pages of examples/, those that train for a minute too.
examples: $(READY)
	WEFT_EXAMPLES=all $(BIN)/pytest tests/examples

FUZZ_MINUTES ?= 5
fuzz: $(READY)
	WEFT_FUZZ_MINUTES=$(FUZZ_MINUTES) $(BIN)/pytest tests/server/api/test_fuzz.py

check: $(READY) $(STUBS)/.ready $(PROMTOOL)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/hadolint Dockerfile
	$(BIN)/pytest -q tests/deploy/test_manifests.py
	rm -rf $(STUBS)/out && mkdir $(STUBS)/out
	$(call generate,$(STUBS)/out)
	diff -r -x __pycache__ $(STUBS)/out/weft/v1 src/weft/v1
	if [ -x $(PROMTOOL) ]; then $(PROMTOOL) check rules deploy/prometheus/rules.yaml && \
		$(PROMTOOL) test rules deploy/prometheus/rules_test.yaml; else echo "$(NO_PROMTOOL)"; fi

protos: $(STUBS)/.ready
	rm -f src/weft/v1/*_pb2*
	$(call generate,src)

# Writes the stubs of protos/ under the folder $(1).
generate = $(STUBS)/bin/python -m grpc_tools.protoc -I protos --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) \
	--plugin=$(STUBS)/bin/protoc-gen-mypy_grpc --mypy_grpc_out=quiet:$(1) protos/weft/v1/*.proto

$(READY): pyproject.toml setup.py constraints.txt $(wildcard kernels/c/*)
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PIP) install --quiet --constraint constraints.txt setuptools uv
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt torch \
		|| echo "PyTorch's own index did not serve: installing the build that pip finds."
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

$(STUBS)/.ready: protos/requirements.txt
	$(PYTHON) -m venv --without-pip $(STUBS)
	$(PYTHON) -m pip --disable-pip-version-check --python $(STUBS)/bin/python install --quiet --requirement $<
	touch $@

# The one on the PATH, or Debian's, unpacked and not installed.
$(PROMTOOL): | $(READY)
	@rm -rf $(VENV)/prometheus && mkdir $(VENV)/prometheus
	@if command -v promtool; then ln -s "$$(command -v promtool)" $@; else \
		cd $(VENV)/prometheus && apt-get download prometheus && dpkg -x prometheus_*.deb . && \
		cp usr/bin/promtool ../bin/; fi || echo "$(NO_PROMTOOL)"

NO_PROMTOOL := SKIPPED: promtool is not on the PATH and not to be had from apt: metrics and alert rules go unchecked.
