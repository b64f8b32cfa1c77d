#!/usr/bin/env bash
# Formats the C++ and CUDA sources in place with clang-format 14; with --check, fails on the first file that would change.
set -euo pipefail
cd "$(dirname "$0")/.."

mode=(-i)
[[ ${1:-} == --check ]] && mode=(--dry-run -Werror)

find src apps tests bench tools \( -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' \) -print0 |
  xargs -0 -r clang-format-14 "${mode[@]}"
