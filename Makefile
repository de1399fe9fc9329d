# The course's commands. Each sets itself up first (tools/course.py says how), then runs one line.
# Without make, on Windows: py tools\course.py lab

PYTHON ?= $(or $(shell command -v python3),$(shell command -v python),python3)

.PHONY: lab test quick notebooks site bench data
lab:        ; @$(PYTHON) tools/course.py lab
test:       ; @$(PYTHON) tools/course.py test
quick:      ; @$(PYTHON) tools/course.py quick
notebooks:  ; @$(PYTHON) tools/course.py notebooks
site:       ; @$(PYTHON) tools/course.py site
bench:      ; @$(PYTHON) tools/course.py bench
data:       ; @$(PYTHON) tools/course.py data
