# compresslab: these commands do everything on a fresh machine.
#   make demo      compress the bundled model and print what came out
#   make test      the whole test suite (about an hour on two cores)
#   make quick     the same without the tests marked slow: what each push runs
#   make docs      the docs site, into _docs
#   make reports   every report, into reports/ (hours; goes on where it was stopped)
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test quick docs reports export outputs clean

demo: $(VENV)/.ready
	HF_HUB_OFFLINE=1 $(BIN)/compresslab report quant --profile smoke

quick: MARKS := -m "not slow"
test quick: $(VENV)/.ready
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(MARKS)

# nbdev's own site where Quarto is there; elsewhere the same processed notebooks by Sphinx, which needs no network, and nbdev is kept from installing Quarto; a broken link is an error
docs: $(VENV)/.ready
	if command -v quarto >/dev/null; then $(BIN)/nbdev-docs; else \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]' && \
	rm -rf _proc _docs && HF_HUB_OFFLINE=1 $(BIN)/python -c "from nbdev import quarto; quarto._ensure_quarto = lambda: None; quarto.nbdev_proc_nbs.__wrapped__()" && \
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs _proc _docs && \
	$(BIN)/linkchecker --no-status --no-warnings --ignore-url '^https?:' "file://$(CURDIR)/_docs/index.html"; fi
	@echo "the site: _docs/index.html"

reports: $(VENV)/.ready
	HF_HUB_OFFLINE=1 $(BIN)/compresslab reports --profile cpu

# export the notebooks to the package, clean them, and make README.md from nbs/index.ipynb
export: $(VENV)/.ready
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean
	$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --RegexRemovePreprocessor.patterns='#\| hide' --output-dir . --output README nbs/index.ipynb

# run the chapters and keep what they print and draw
outputs: $(VENV)/.ready
	for n in $$(git ls-files 'nbs/*.ipynb' | grep -v ^nbs/reports); do TQDM_DISABLE=1 HF_HUB_OFFLINE=1 $(BIN)/nbdev-test $$n --save || exit 1; done

$(VENV)/.ready: constraints.txt pyproject.toml
	python3 -c 'import sys; assert sys.version_info >= (3, 11), "compresslab needs Python 3.11 or newer"'
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt torch==2.13.0 --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build out _docs _proc
