#!/usr/bin/env bash
# Runs every fuzz_* binary of a folder for some seconds each: run_fuzzers.sh FOLDER SECONDS
# Inputs found on the way stay in FOLDER/found/<fuzzer>/; a crash ends the run and leaves its input there too.
set -euo pipefail
folder=$1
seconds=$2
seeds=$(dirname "$0")/../tests/fuzz/seeds
export ASAN_SYMBOLIZER_PATH=/usr/lib/llvm-16/bin/llvm-symbolizer

ran=0
for fuzzer in "$folder"/fuzz_*; do
  [[ -f $fuzzer && -x $fuzzer ]] || continue
  name=$(basename "$fuzzer")
  found=$folder/found/$name
  mkdir -p "$found"
  inputs=("$found")
  [[ -d $seeds/${name#fuzz_} ]] && inputs+=("$seeds/${name#fuzz_}")
  echo "$name: $seconds s"
  log=$found.log
  if ! "$fuzzer" -max_total_time="$seconds" -rss_limit_mb=4096 -timeout=10 -print_final_stats=1 -artifact_prefix="$found/" \
    "${inputs[@]}" >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    echo "$name failed; its whole output is in $log" >&2
    exit 1
  fi
  grep -E 'number_of_executed_units|peak_rss_mb' "$log"
  ran=$((ran + 1))
done
if ((ran == 0)); then
  echo "no fuzz_* in $folder" >&2
  exit 1
fi
echo "$ran fuzzers, no failure"
