# Two commands for a newcomer; each does all its own set-up in .venv.
#   make serve    serve the bundled model
#   make test     lint, type-check and run all tests
# And one for those who change native/:
#   make sanitize  build it with sanitizers and run its checks: memory and undefined behaviour, then data races
PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
SOURCES = $(shell find native src -name '*.py' -o -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name '*.html' -o -name CMakeLists.txt 2>/dev/null)

.PHONY: serve test lint sanitize clean

serve: .venv/serve.done
	.venv/bin/bitgrain serve $(ARGS)

# a process per core with one thread each; waiting threads sleep: on a busy machine spinning ones would take the cores from those that work
test: .venv/test.done lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive .venv/bin/python -m pytest -q -ra -n auto --dist worksteal $(ARGS)

# CMake as a command of the system or of .venv; needs no package of Python
sanitize: .sanitize/Address.ran .sanitize/Thread.ran

CMAKE = $(shell command -v cmake || echo .venv/bin/cmake)
NATIVE = $(shell find native -name '*.cpp' -o -name '*.hpp' -o -name CMakeLists.txt)
.sanitize/%.ran: $(NATIVE)
	$(CMAKE) -S native -B .sanitize/$* -DCMAKE_BUILD_TYPE=$* -DBITGRAIN_TESTS=ON
	$(CMAKE) --build .sanitize/$* --parallel $(shell nproc 2>/dev/null || echo 2)
	UBSAN_OPTIONS=print_stacktrace=1 .sanitize/$*/bitgrain_checks
	touch $@

lint: .venv/test.done
	.venv/bin/ruff check .
	.venv/bin/mypy

# torch first and by exact version, so that a resolver does not fetch another build of it
.venv/torch.done:
	$(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)"
	touch $@

.venv/serve.done: .venv/torch.done pyproject.toml $(SOURCES)
	$(PIP) ".[cli,server]"
	touch $@

.venv/test.done: .venv/torch.done pyproject.toml $(SOURCES)
	$(PIP) ".[dev]"
	touch $@

clean:
	rm -rf .venv .sanitize build dist
