# `make demo` and `make test` set up everything they need in $(VENV); the second run is quick.
#   make demo [IMAGE=photo.jpg]   build, then draw a skeleton on a photo -> demo/
#   make test                     build, then run the test suite
#   make cuda-check               compile the CUDA kernels with nvcc, for every architecture; needs no GPU
#   make abi                      run the operator tests with this one binary on the lowest and the newest supported torch
PYTHON ?= python3
VENV ?= .venv
IMAGE ?= demo/astronaut.png
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
RUN = $(VENV)/bin/python
CONSTRAINTS = .ci/constraints.txt
SOURCES = $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*/*.h csrc/*/*.cpp csrc/*/*.cu) setup.py

.PHONY: demo test abi cuda-check lint clean build

demo: build
	@mkdir -p demo
	@test "$(IMAGE)" != demo/astronaut.png || $(RUN) -c "import skimage.data, skimage.io; \
	  skimage.io.imsave('demo/astronaut.png', skimage.data.astronaut(), check_contrast=False)"
	@$(RUN) -m fastpose predict "$(IMAGE)" --output demo

test: build $(VENV)/.tools
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --dist worksteal

build: $(VENV)/.built
	@$(RUN) -c "from fastpose.ops import _backend as b; \
	  print('fastpose: fused kernels are in use' if b.LOADED else 'fastpose: running on plain PyTorch: ' + b.WHY_NOT)"

# torch first: the extension is compiled against it
$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "fastpose: installing the tested versions of torch and its companions into $(VENV)"
	@$(PIP) install -c $(CONSTRAINTS) torch numpy setuptools wheel ninja pybind11
	@$(PIP) install -c $(CONSTRAINTS) opencv-python safetensors tqdm pytest pytest-xdist scipy pycocotools scikit-image
	@touch $@

# for tests of what is optional
$(VENV)/.tools: $(VENV)/.installed
	@$(PIP) install -c $(CONSTRAINTS) onnx onnxscript onnxruntime
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@echo "fastpose: building (about a minute)"
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

# a CUDA build of torch works as well as a CPU build; several GB each
abi: build
	@for version in 2.11.0 2.14.1; do \
	  test -d $(VENV)-$$version || ($(PYTHON) -m venv $(VENV)-$$version && $(VENV)-$$version/bin/python -m pip install -q \
	    torch==$$version numpy opencv-python safetensors tqdm pytest scipy scikit-image) || exit 1; \
	  echo "torch $$version"; \
	  PYTHONPATH=. FASTPOSE_FUSED=1 $(VENV)-$$version/bin/python -m pytest -q tests/ops tests/test_plan.py tests/test_models.py tests/test_graphs.py || exit 1; \
	done

cuda-check: $(VENV)/.installed
	@$(RUN) setup.py -q cuda_check

lint: $(VENV)/.installed
	@$(PIP) install -c $(CONSTRAINTS) ruff mypy clang-format
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy
	@$(VENV)/bin/clang-format --dry-run -Werror $(filter csrc/%,$(SOURCES)) tests/cuda/emulation.h

clean:
	rm -rf build $(VENV) $(VENV)-2.11.0 $(VENV)-2.14.1 demo fastpose/*.so
