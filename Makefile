# Every target installs what it needs, configures and builds by itself; `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
MAKEFLAGS += --no-print-directory

MODEL ?= vericode-26m
DOCUMENT ?= examples/tool-calls-8k.txt
# A device that holds the weights and the 4-bit cache, not the full one, behind a link of 2 GB/s.
RUN_FLAGS ?= --compressor quarot:bits=4 --max-tokens 640 --device-memory 140M --wire-gbps 2 --compare-full
FUZZ_SECONDS ?= 60

# TSan watches the rooms that have threads; ASan and UBSan watch every room. Property tests run fewer cases there.
SANITIZED_asan := base backend kv compress model speculate engine text
SANITIZED_ubsan := $(SANITIZED_asan)
SANITIZED_tsan := base backend kv engine
SANITIZED_CASES ?= 10
# Sanitizers slow the kernels many times over: they do without the widest matrices, which the plain suite runs.
WIDE := */Bits.RowsDoNotDependOnTheirCompany/*:RowInvariance.FiveHundred*:Engine.EveryCompressor*:Bundled/*
FILTER_asan := -$(WIDE)
FILTER_ubsan := $(FILTER_asan)
FILTER_tsan := $(FILTER_asan):Traffic*

# ccache needs a place to write, also where there is no home to write in.
ifneq ($(shell test -w "$$HOME" && echo writable),writable)
export CCACHE_DIR ?= $(CURDIR)/.cache/ccache
endif

CTEST := ctest --output-on-failure --no-tests=error
empty :=
space := $(empty) $(empty)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: packages dev-packages
packages:
	@tools/install_packages.sh

dev-packages:
	@tools/install_packages.sh --dev

# ninja configures again by itself when a CMake file changes; only the first time and a changed preset are ours.
build/build.ninja: CMakePresets.json | packages
	cmake --preset release

.PHONY: build
build: packages build/build.ninja ## build everything; the binary is build/vericache, the models are in build/models/
	cmake --build build

.PHONY: run
run: build ## decode a long document from a compressed cache, then from the full one, and compare
	build/vericache generate --model build/models/$(MODEL) --prompt-file $(DOCUMENT) $(RUN_FLAGS)

.PHONY: test
test: build ## build everything and run every test but the long ones
	$(CTEST) --test-dir build -LE '^long$$'

.PHONY: test-long
test-long: dev-packages build ## the soaks and full matrices, then each fuzzer for FUZZ_SECONDS (60)
	$(CTEST) --test-dir build -L '^long$$'
	$(MAKE) fuzz

.PHONY: fuzz
fuzz: dev-packages ## each fuzzer for FUZZ_SECONDS (60), from the seeds in tests/fuzz/seeds/
	cmake --preset fuzz >/dev/null
	cmake --build build-fuzz --target fuzzers
	tools/run_fuzzers.sh build-fuzz/tests/fuzz $(FUZZ_SECONDS)

.PHONY: bench
bench: build ## decode throughput, full cache against compressed, and the micro benchmarks
	build/vericache bench --model build/models/$(MODEL)
	@for b in build/bench/*_bench; do [[ ! -x $$b ]] || "$$b"; done

.PHONY: check
check: dev-packages ## all that a change must pass: format, layers, warnings as errors, clang-tidy, tests
	tools/format.sh --check
	python3 tests/layers_test.py
	python3 tests/tree_test.py
	$(MAKE) build
	tools/tidy.sh
	$(MAKE) test

.PHONY: format
format: dev-packages ## format every .h, .cc, .cu and .cuh in place
	tools/format.sh

.PHONY: asan ubsan tsan
asan: ## build with AddressSanitizer and UBSan and run the tests that fit
ubsan: ## build with UndefinedBehaviorSanitizer and run the tests that fit
tsan: ## build with ThreadSanitizer and run the tests of the rooms that have threads
# A shadow map may collide with a randomized address space: start without randomization where that is allowed.
asan ubsan tsan: packages
	cmake --preset $@ >/dev/null
	cmake --build build-$@ --target room_tests
	export RC_PARAMS="max_success=$(SANITIZED_CASES)" UBSAN_OPTIONS=print_stacktrace=1 GTEST_FILTER='$(FILTER_$@)'; \
	fixed=; setarch -R true 2>/dev/null && fixed='setarch -R'; \
	$$fixed $(CTEST) --test-dir build-$@ -R '^($(subst $(space),|,$(SANITIZED_$@)))$$'

.PHONY: tarball
tarball: packages ## build with the CUDA backend (needs nvcc) and pack binaries that run on other machines
	cmake --preset cuda >/dev/null
	cmake --build build-cuda --target tarball

.PHONY: gpu-proof
gpu-proof: packages ## on a machine with a GPU: the CUDA tests under compute-sanitizer, SLICE_SECONDS (300) a suite and tool
	cmake --preset cuda >/dev/null
	cmake --build build-cuda --target test_cuda
	tools/gpu_proof.sh build-cuda/tests/test_cuda

.PHONY: clean
clean: ## remove every build folder
	rm -rf build build-*
