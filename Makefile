# make demo    pre-train a small CrossMAE on handwritten digits, evaluate it, draw
# make test    run the tests
#
# Each first installs the versions of constraints.txt into .venv, once; the tests also
# PyTorch, timm and transformers, to compare with. With another Python:
# make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
DEMO := $(VENV)/.installed-demo
TEST := $(VENV)/.installed-test
INSTALL := $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test

demo: $(DEMO)
	$(VENV)/bin/python -m crossmae_jax.main --config=configs/digits_cross.py --workdir=runs/digits_cross

test: $(TEST)
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

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
	$(INSTALL) --no-build-isolation --editable '.[demo,test,interop]'
	touch $@
