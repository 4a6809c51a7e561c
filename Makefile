# make quickstart | sft_quickstart | test | slow | cases | reliability | check | docs | clean — everything happens in .venv
PYTHON ?= python3
CONSTRAINTS ?= -c constraints.txt
BIN = .venv/bin
RUN = $(BIN)/lit_longctx

.PHONY: quickstart sft_quickstart test slow cases reliability check docs venv clean

# one install for everything: `make test` after `make quickstart` finds nothing left to do
venv: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), f'Python 3.11 or newer is needed, this is {sys.version}'"
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[hf,eval,scale,synthesize,notebooks,docs,dev]'
	touch $@

quickstart: venv
	rm -rf data/stdlib runs/quickstart runs/quickstart_short exports/quickstart
	$(RUN) prepare --config config/quickstart_prepare.yaml
	$(RUN) fit --config config/quickstart_short.yaml
	$(RUN) fit --config config/quickstart.yaml
	$(RUN) evaluate --config config/quickstart_evaluate.yaml
	$(RUN) export --checkpoint runs/quickstart --output exports/quickstart

sft_quickstart: venv
	rm -rf data/sft_quickstart data/sft_*.jsonl* runs/sft_quickstart runs/sft_quickstart_input_loss
	$(RUN) synthesize --config config/sft_quickstart_synthesize.yaml
	$(RUN) synthesize --config config/sft_quickstart_synthesize.yaml --task.kind Table --output data/sft_tables.jsonl
	$(RUN) prepare --config config/sft_quickstart_prepare.yaml
	$(RUN) fit --config config/sft_quickstart.yaml
	$(RUN) fit --config config/sft_quickstart.yaml --data.init_args.input_loss 1 \
	    --trainer.default_root_dir runs/sft_quickstart_input_loss
	$(RUN) evaluate --config config/sft_quickstart_evaluate.yaml

test: venv
	$(BIN)/python -m pytest -n 2 --dist worksteal

slow: venv
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 1200

cases: venv
	$(BIN)/python tests/test_cases.py

reliability: venv
	$(BIN)/python tests/reliability/table.py -n 2 --dist worksteal

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/codespell

docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir runs/site

clean:
	rm -rf .venv data runs exports
