# make demo    pre-train a small CrossMAE on handwritten digits, evaluate it, draw
# make test    run the tests
#
# Each first installs the versions of constraints.txt into .venv, once; the tests also
# PyTorch, timm and transformers, to compare with, the TPU's compiler, what corrupts
# images, and what reads buckets. With another Python: make demo PYTHON=python3.12
#
# make test-tpu-compile    compile for more TPUs that need not be there than the tests do
# make test-gpu-compile    compile for a GPU that need not be there (1.5 GB)

PYTHON ?= python3
VENV := .venv
DEMO := $(VENV)/.installed-demo
TEST := $(VENV)/.installed-test
GPU := $(VENV)/.installed-gpu
# Modules are compiled when they are first imported: most that are installed never are.
# That has to be kept, or each of the processes that tests start compiles thousands again;
# images for containers often set this variable.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(VENV)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt
# Compilers for devices that are not there lie beside the packages: among them, JAX would
# look for the devices whenever it starts. tests/compiling.py finds them.
BESIDE := $(INSTALL) --no-deps --upgrade --target $(VENV)

.PHONY: demo test test-tpu-compile test-gpu-compile

demo: $(DEMO)
	$(VENV)/bin/python -m crossmae_jax.main --config=configs/digits_cross.py --workdir=runs/digits_cross

test: $(TEST)
	$(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test-tpu-compile: $(TEST)
	$(VENV)/bin/python -m pytest tests/tpu_compile.py

test-gpu-compile: $(GPU)
	$(VENV)/bin/python -m pytest tests/gpu_compile.py

# setuptools is installed first, from the pins as well: pip would otherwise build the
# project with whatever version is newest that day.
$(DEMO): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "crossmae_jax needs Python 3.11 or newer, but '$(PYTHON)' is" \
	         "$$($(PYTHON) --version 2>&1 || true). Name a newer one: make PYTHON=python3.12" >&2; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable '.[demo]'
	touch $@

$(TEST): $(DEMO)
	$(INSTALL) --no-build-isolation --editable '.[demo,test,interop,robustness,gcs,notebooks]'
	$(BESIDE)/tpu 'libtpu; sys_platform == "linux" and platform_machine == "x86_64"'
	touch $@

# NVIDIA's versions stand here: in constraints.txt they would contradict PyTorch's own.
$(GPU): $(TEST)
	$(BESIDE)/gpu jax-cuda13-plugin jax-cuda13-pjrt nvidia-cudnn-cu13==9.28.0.42 \
	    nvidia-cuda-nvrtc==13.5.37 nvidia-cuda-runtime==13.5.37
	touch $@
