#!/bin/sh
# Runs the native tests under AddressSanitizer + UndefinedBehaviorSanitizer, then under ThreadSanitizer, with libraries built
# for it in a temporary folder. Usage, from the root of the repository: sh csrc/sanitize.sh [python]
set -eu
python=${1:-python}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

run() {  # name, value of -fsanitize, runtime to preload, options of the runtime, pytest arguments
    cmake -S "$root/csrc" -B "$work/$1" -G Ninja -DDBA_SANITIZE="$2" > "$work/$1.log"
    cmake --build "$work/$1" >> "$work/$1.log"
    mkdir "$work/$1-tree"
    cp -r "$root/dba_kernels" "$root/tests" "$root/bench" "$root/pyproject.toml" "$work/$1-tree"
    cp "$work/$1/libdba_native.so" "$work/$1-tree/dba_kernels/"
    echo "== $2"
    # libstdc++ beside the runtime: torch throws, and the runtime looks for __cxa_throw before torch is loaded.
    preload="$(c++ -print-file-name="$3"):$(c++ -print-file-name=libstdc++.so.6)"
    options="$4:log_path=$work/$1.report"
    (cd "$work/$1-tree" && env LD_PRELOAD="$preload" ASAN_OPTIONS="$options" UBSAN_OPTIONS="$options" \
        TSAN_OPTIONS="$options" OMP_NUM_THREADS=1 PYTHONPATH=. "$python" -m pytest -p no:cacheprovider -x $5) ||
        { cat "$work/$1.report"* 2> /dev/null; exit 1; }
}

stems="tests/test_native.py tests/test_step.py tests/test_similarity.py tests/test_quantize.py tests/test_accumulate.py"
run asan address,undefined libasan.so detect_leaks=0 "$stems -k not(triton)"
# torch's own threads are not instrumented: reports without a frame of this library do not count.
run tsan thread libtsan.so halt_on_error=1:ignore_noninstrumented_modules=1 "tests/test_native.py -k threads"
