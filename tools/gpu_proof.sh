#!/usr/bin/env bash
# Runs the CUDA tests under compute-sanitizer on a machine with a GPU, a suite at a time, so that a tool that needs too
# long for one suite says so and the others are still proved: gpu_proof.sh TEST_CUDA [LOG_FOLDER]
#   SLICE_SECONDS   at most so long for a suite under a tool (300)
#   PROOF_SECONDS   at most so long in all; what is left over is named as not run (no limit)
#   TOOLS           memcheck and racecheck, or others of compute-sanitizer
#   SLICE_BY        suite or test (suite)
#   JOBS            slices at a time (1)
#   GTEST_FILTER    which tests (all)
# Kernels of VeriCache alone are looked at: those of cuBLASLt are not ours, and take the tools most of their time.
# One line a slice: tool, slice, and passed, errors (the tool's count), failed (a test), or time out. The last line adds
# up; the exit status is 0 if every slice passed.
set -uo pipefail
test_cuda=${1:?the test binary, build-cuda/tests/test_cuda}
logs=${2:-$(dirname "$test_cuda")/gpu-proof}
seconds=${SLICE_SECONDS:-300}
total=${PROOF_SECONDS:-0}
tools=${TOOLS:-memcheck racecheck}
by=${SLICE_BY:-suite}
most=${JOBS:-1}
filter=${GTEST_FILTER:-*}
unset GTEST_FILTER
mkdir -p "$logs"

if ! command -v compute-sanitizer >/dev/null; then
  echo "compute-sanitizer is not on the PATH: it comes with the CUDA toolkit" >&2
  exit 2
fi

# "Suite.": its tests stand below it, indented. What stands behind a # is a parameter.
list_slices() {
  "$test_cuda" --gtest_list_tests --gtest_filter="$filter" | awk -v by="$by" '
    /^[^ ].*\.( |$)/ { suite = $1; if (by == "suite") print suite "*"; next }
    /^  / { if (by == "test") print suite $1 }'
}
# --gtest_filter of a slice. Of a suite, the tests that the wanted ones and the suite have in common: a filter knows no
# "and", so they are named one by one.
tests_of() {
  "$test_cuda" --gtest_list_tests --gtest_filter="$filter" | awk -v slice="$1" '
    /^[^ ].*\.( |$)/ { suite = $1; next }
    /^  / { if (suite "*" == slice || suite $1 == slice) names = names ":" suite $1 }
    END { print substr(names, 2) }'
}

slices=$(list_slices)
if [[ -z $slices ]]; then
  echo "no tests in $test_cuda match $filter" >&2
  exit 2
fi

# prove TOOL SLICE LOG: its line.
prove() {
  local tool=$1 slice=$2 log=$3 limit=$seconds begin=$SECONDS status summary verdict
  if ((total > 0)); then
    local left=$((total - (SECONDS - started)))
    limit=$((left < limit ? left : limit))
  fi
  if ((limit <= 0)); then
    printf '%-10s %-52s %-9s\n' "$tool" "$slice" "not run"
    return
  fi
  timeout --kill-after=10 "$limit" compute-sanitizer --tool "$tool" --error-exitcode 99 --launch-timeout 60 \
    --require-cuda-init no --kernel-name kns=vericache \
    "$test_cuda" --gtest_brief=1 --gtest_filter="$(tests_of "$slice")" >"$log" 2>&1 </dev/null
  status=$?
  # memcheck ends with "ERROR SUMMARY: N errors", racecheck with "RACECHECK SUMMARY: N hazards displayed (...)".
  summary=$(grep -Eo '(ERROR SUMMARY: [0-9]+ errors?|RACECHECK SUMMARY: [0-9]+ hazards?.*)' "$log" | tail -n 1)
  case $status in
    0)
      if grep -q 'SKIPPED' "$log"; then
        verdict=skipped
      elif grep -Eq 'SUMMARY: 0 ' <<<"$summary"; then
        verdict=passed
      else
        verdict=errors
      fi
      ;;
    99) verdict=errors ;;
    124 | 137) verdict="time out" ;;
    *) verdict=failed ;;
  esac
  printf '%-10s %-52s %-9s %4d s  %s\n' "$tool" "$slice" "$verdict" $((SECONDS - begin)) "$summary"
}

started=$SECONDS
lines=$logs/lines
: >"$lines"
for tool in $tools; do
  while IFS= read -r slice; do
    while (($(jobs -rp | wc -l) >= most)); do
      wait -n
    done
    prove "$tool" "$slice" "$logs/$tool-$(tr -c 'A-Za-z0-9\n' '_' <<<"$slice").log" | tee -a "$lines" &
  done <<<"$slices"
done
wait

of() { grep -Ec "^[a-z]+ +[^ ]+ +$1( |\$)" "$lines"; }
passed=$(of passed)
echo "$passed slices passed, $(of errors) with errors, $(of failed) failed, $(of 'time out') timed out, $(of skipped)" \
  "skipped, $(of 'not run') not run; logs in $logs"
((passed > 0 && passed == $(wc -l <"$lines")))
