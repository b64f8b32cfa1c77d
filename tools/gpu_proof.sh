#!/usr/bin/env bash
# Runs the CUDA tests under compute-sanitizer on a machine with a GPU, a suite at a time, so that a tool that needs too
# long for one suite says so and the others are still proved: gpu_proof.sh TEST_CUDA [LOG_FOLDER]
#   SLICE_SECONDS   at most so long for a suite under a tool (300)
#   PROOF_SECONDS   at most so long in all; what is left over is named as not run (no limit)
#   TOOLS           memcheck and racecheck, or others of compute-sanitizer
#   SLICE_BY        suite or test (suite)
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

declare -A count=([passed]=0 [errors]=0 [failed]=0 ["time out"]=0 [skipped]=0 ["not run"]=0)
started=$SECONDS
for tool in $tools; do
  while IFS= read -r slice; do
    log=$logs/$tool-$(tr -c 'A-Za-z0-9\n' '_' <<<"$slice").log
    limit=$seconds
    if ((total > 0)); then
      left=$((total - (SECONDS - started)))
      limit=$((left < limit ? left : limit))
    fi
    if ((limit <= 0)); then
      count["not run"]=$((count["not run"] + 1))
      printf '%-10s %-48s %-9s\n' "$tool" "$slice" "not run"
      continue
    fi
    begin=$SECONDS
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
    count[$verdict]=$((count[$verdict] + 1))
    printf '%-10s %-48s %-9s %4d s  %s\n' "$tool" "$slice" "$verdict" $((SECONDS - begin)) "$summary"
  done <<<"$slices"
done

echo "${count[passed]} slices passed, ${count[errors]} with errors, ${count[failed]} failed, ${count["time out"]} timed" \
  "out, ${count[skipped]} skipped, ${count["not run"]} not run; logs in $logs"
((count[passed] > 0 && count[errors] + count[failed] + count["time out"] + count[skipped] + count["not run"] == 0))
