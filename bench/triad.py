"""The bandwidth ceiling of an in-place update: a tuned loop over the same number of read and written streams.

AdamW in fp32 reads four streams and writes three of them back: 28 bytes per element. A copy is not the ceiling of such
a loop, because a write to a line that was just read needs no second read. The loop is C++, one contiguous range of
elements per thread, compiled with ``-O3 -march=native`` when first used.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

BYTES_PER_ELEMENT = 28

SOURCE = r"""
#include <cstdint>
#include <thread>
#include <vector>

// Three streams updated in place from a fourth, the cheapest arithmetic that needs all of them.
static void update(float* a, float* b, float* c, const float* g, int64_t begin, int64_t end) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
        float x = g[i];
        b[i] = 0.9f * b[i] + x;
        c[i] = 0.99f * c[i] + x;
        a[i] = a[i] - 0.5f * x;
    }
}

// The same four streams, only read. The bits are combined as integers, whose order the compiler may change.
static void read(float* a, float* b, float* c, const float* g, int64_t begin, int64_t end) {
    auto bits = [](const float* p) { return reinterpret_cast<const uint32_t*>(p); };
    uint32_t sum = 0;
    for (int64_t i = begin; i < end; ++i) sum += (bits(a)[i] ^ bits(b)[i]) + (bits(c)[i] ^ bits(g)[i]);
    volatile uint32_t kept = sum;
    (void)kept;
}

extern "C" void run(int64_t writes, float* a, float* b, float* c, const float* g, int64_t n, int64_t threads) {
    auto range = writes ? update : read;
    std::vector<std::thread> others;
    auto bound = [&](int64_t t) { return n * t / threads / 16 * 16; };
    for (int64_t t = 1; t < threads; ++t)
        others.emplace_back(range, a, b, c, g, bound(t), t + 1 == threads ? n : bound(t + 1));
    range(a, b, c, g, 0, threads == 1 ? n : bound(1));
    for (auto& other : others) other.join();
}
"""


@functools.cache
def _library() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="dba_triad_"))
    source, library = folder / "triad.cpp", folder / "triad.so"
    source.write_text(SOURCE)
    flags = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["c++", *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def triad(elements: int, writes: bool = True) -> Callable[[], None]:
    """One pass over 28 bytes per element with ``torch.get_num_threads()`` threads; 16 where it only reads."""
    streams = [torch.full((elements,), 1e-3) for _ in range(4)]
    run = _library().run
    run.argtypes = [ctypes.c_int64] + [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2

    def step() -> None:
        run(writes, *(stream.data_ptr() for stream in streams), elements, torch.get_num_threads())

    return step
