# Shared by the scripts of this folder: where things are, and how what is missing gets installed.
# Source it; it changes to the repository's root.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Tools by full path: the first `cmake` or `python3` in PATH may be of a virtual environment.
CMAKE=/usr/bin/cmake
CTEST=/usr/bin/ctest
NINJA=/usr/bin/ninja
PYTHON=/usr/bin/python3

# Objects are shared between clones: paths below this one count as relative.
export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1
# Without these, nothing that uses precompiled headers is cached (ccache's manual).
export CCACHE_SLOPPINESS=pch_defines,time_macros

BUILD_PACKAGES=(
  g++ cmake ninja-build ccache pkg-config git
  libabsl-dev libdw-dev libhdf5-dev libssl-dev liburing-dev libisal-dev libgtest-dev libgmock-dev
  libcli11-dev libmicrohttpd-dev libspdlog-dev nlohmann-json3-dev libtomlplusplus-dev libzstd-dev libre2-dev
)
TEST_PACKAGES=(python3 python3-h5py python3-jsonschema python3-numpy python3-prometheus-client python3-venv hdf5-tools strace
  procps iproute2 nftables libfaketime)
ANALYSIS_PACKAGES=(clang-19 libclang-rt-19-dev clang-tidy-19 clang-format-14)
BENCH_PACKAGES=(fio eatmydata)

say() { printf '\n== %s\n' "$*" >&2; }
fail() { printf '%s\n' "$*" >&2; exit 1; }

# missing_packages PACKAGE...: prints those that are not there.
missing_packages() {
  local package
  for package in "$@"; do
    dpkg-query -W -f='${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed ||
      printf '%s\n' "$package"
  done
}

# install_missing PACKAGE...: installs those that are not there, as root or through sudo.
install_missing() {
  local missing
  mapfile -t missing < <(missing_packages "$@")
  [ ${#missing[@]} -eq 0 ] && return 0
  local as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null ||
      fail "missing packages, and neither root nor sudo to install them: apt-get install ${missing[*]}"
    as_root=(sudo)
  fi
  say "installing ${missing[*]}"
  "${as_root[@]}" apt-get update -qq >&2
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2 ||
    fail "could not install: ${missing[*]}"
}

# build PRESET [TARGET...]: configures and builds into build/PRESET.
build() {
  local preset=$1
  shift
  say "building: $preset"
  "$CMAKE" --preset "$preset" >"build/.configure-$preset.log" 2>&1 ||
    { cat "build/.configure-$preset.log" >&2; fail "configuration failed: $preset"; }
  "$CMAKE" --build --preset "$preset" ${1:+--target "$@"} >&2
}

# run_tests PRESET [CTEST ARGUMENT...]: all tests; prints what was skipped; fails if one fails.
run_tests() {
  local preset=$1 log="build/.ctest-$1.log" status=0
  shift
  say "testing: $preset"
  "$CTEST" --test-dir "build/$preset" --output-on-failure --no-tests=error "$@" 2>&1 |
    tee "$log" || status=$?
  # What GoogleTest skipped inside programs that passed does not show in ctest's own summary.
  local skipped
  skipped=$(grep -hE '^\[  SKIPPED \] [A-Za-z0-9_/.]+ \(' "build/$preset/Testing/Temporary/LastTest.log" |
    sort | uniq -c || true)
  printf 'skipped: %d\n' "$(printf '%s' "$skipped" | grep -c . || true)"
  [ -z "$skipped" ] || printf '%s\n' "$skipped"
  return "$status"
}

mkdir -p build
