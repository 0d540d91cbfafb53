# make demo: from nothing to a model that listens and answers.  make talk: talk to it.  make test: the tests.  make install: both need it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN = .venv/bin
export PYTHONUNBUFFERED = 1

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("nanoduplex needs Python 3.10 or newer, $(PYTHON) is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo,s3,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps s3tokenizer==0.3.0 openwakeword==0.4.0
	touch $@

demo: install
	$(BIN)/python data/demo/prepare.py
	$(BIN)/python train.py config/demo.py --batch_size=4 --resume=true
	$(BIN)/python data/demo/prepare.py --say='What is the capital of Japan?' --voice=linda --wav=out/demo/question.wav
	$(BIN)/python sample.py --checkpoint=out/demo --user=out/demo/question.wav
	$(BIN)/python sample.py --checkpoint=out/demo --data=data/demo --n_dialogue=4
	$(BIN)/python evaluate.py --checkpoint=out/demo --data=data/demo
	@echo 'Look and listen: out/demo/evaluation/report.html (how it learned: out/demo/report.html); out/demo/samples/*.wav, the user left. Talk to it: make talk'

talk: install
	$(BIN)/python talk.py --checkpoint=out/demo

test: install
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'not alone' -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -q -m alone

clean:
	rm -rf .venv out

.PHONY: install demo talk test clean
