#!/usr/bin/env bash
# Installs the Debian 12 packages that the build needs; with --dev also those of `make check` and of the fuzzers.
# Asks dpkg first and leaves apt alone when nothing is missing, so it costs nothing to call before every build.
set -euo pipefail

packages=(
  g++ make cmake ninja-build pkg-config ccache xz-utils python3
  libhwy-dev nlohmann-json3-dev libcli11-dev libfmt-dev libpcre2-dev libxxhash-dev libutf8proc-dev libhiredis-dev
  libgtest-dev libgmock-dev librapidcheck-dev libbenchmark-dev
  redis-tools # holds the server that tests start, and starts none by itself
)
dev_packages=(clang-16 llvm-16 libclang-rt-16-dev clang-tidy-16 clang-format-14)

case "${1:-}" in
  "") ;;
  --dev) packages+=("${dev_packages[@]}") ;;
  *)
    echo "usage: $0 [--dev]" >&2
    exit 2
    ;;
esac

if ! command -v dpkg-query >/dev/null; then
  echo "$0: not a Debian system, nothing installed; the build needs: ${packages[*]}" >&2
  exit 0
fi

missing=()
for package in "${packages[@]}"; do
  state=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
  [[ $state == installed ]] || missing+=("$package")
done
((${#missing[@]})) || exit 0

as_root=()
if ((EUID != 0)); then
  as_root=(sudo)
  if ! command -v sudo >/dev/null; then
    echo "$0: these packages are missing: ${missing[*]}" >&2
    echo "$0: run as root: apt-get install ${missing[*]}" >&2
    exit 1
  fi
fi

echo "Installing ${#missing[@]} packages: ${missing[*]}" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() {
  if ! "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 "$@" \
    </dev/null >"$log" 2>&1; then
    cat "$log" >&2
    echo "$0: apt-get $1 failed (above); check the network and the package sources" >&2
    exit 1
  fi
}
apt update
apt install -y --no-install-recommends "${missing[@]}"
