# make demo    pre-train a small CrossMAE on handwritten digits, evaluate it, draw
# make test    run the tests
#
# Both first create .venv with the versions of constraints.txt, once. With another
# Python: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test

demo: $(INSTALLED)
	$(VENV)/bin/python -m crossmae_jax.main --config=configs/digits_cross.py --workdir=runs/digits_cross

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

# setuptools is installed first, from the pins as well: pip would otherwise build the
# project with whatever version is newest that day.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "crossmae_jax needs Python 3.11 or newer, but '$(PYTHON)' is" \
	         "$$($(PYTHON) --version 2>&1 || true). Name a newer one: make PYTHON=python3.12" >&2; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt setuptools
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt \
	    --no-build-isolation --editable '.[demo,test]'
	touch $@
