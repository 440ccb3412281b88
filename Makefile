# What is done often, by its name. PYTHON is the interpreter of the environment that `pip install -e '.[dev,docs]'` was run in.
PYTHON ?= python

.PHONY: site readme export test gate
site:           ## the site, in _site/
	$(PYTHON) tools/site.py
readme:         ## README.md from the index
	$(PYTHON) tools/readme.py
export:         ## the modules from the notebooks
	nbdev_export
test:           ## the notebooks, cell by cell
	OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --timing
gate:           ## everything, in a fresh clone and environment
	$(PYTHON) tools/gate.py
