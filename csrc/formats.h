// Formats of everything that is stored; the C++ side of dba_kernels/formats.py, kept in this one header.
#pragma once

#include <cstdint>

namespace dba {

constexpr int GROUP = 64;  // columns that share one fp32 scale

constexpr float SMALLEST_SCALE = 0x1p-126f;  // groups with a smaller scale are stored as zeros

constexpr double SQUARED_NORM_LIMIT = 0.999e36;  // a gradient whose squared norm is larger counts as non-finite

// Value of the largest code of a moment in units of its scale.
constexpr double EXP_AVG_ABSMAX_VALUE = 127.0 * 127.0;      // m = scale * c * |c|
constexpr double EXP_AVG_SQ_MAX_VALUE = 65025.0 * 65025.0;  // v = scale * c^4, c <= 255

// The numbers below are the interface to native.py.
enum Dtype : int64_t { FP32 = 0, BF16 = 1, FP16 = 2, DTYPES = 3 };
enum ParamFormat : int64_t { NATIVE = 0, SPLIT16 = 1, SPLIT8 = 2, MASTER = 3, PARAM_FORMATS = 4 };
enum StateFormat : int64_t { STATE_FP32 = 0, STATE_BF16 = 1, STATE_INT8 = 2, STATE_FORMATS = 3 };
enum GlobalFormat : int64_t {
    GLOBAL_NONE = 0,
    GLOBAL_FP32 = 1,
    GLOBAL_BF16 = 2,
    GLOBAL_FP16 = 3,
    GLOBAL_FP8 = 4,
    GLOBAL_INT8 = 5,
    GLOBAL_INT4 = 6,
    GLOBAL_FORMATS = 7
};

static constexpr int dtype_bytes(int64_t dtype) { return dtype == FP32 ? 4 : 2; }
static constexpr int state_bytes(int64_t format) { return format == STATE_FP32 ? 4 : format == STATE_BF16 ? 2 : 1; }
static constexpr int remainder_bytes(int64_t format) {
    return format == SPLIT16 ? 2 : format == SPLIT8 ? 1 : format == MASTER ? 4 : 0;
}
static constexpr bool global_is_grouped(int64_t format) { return format >= GLOBAL_FP8; }

// Bytes of n stored elements that start at an even position of their row.
static constexpr int64_t global_bytes(int64_t format, int64_t n) {
    switch (format) {
        case GLOBAL_FP32: return 4 * n;
        case GLOBAL_BF16:
        case GLOBAL_FP16: return 2 * n;
        case GLOBAL_FP8:
        case GLOBAL_INT8: return n;
        case GLOBAL_INT4: return (n + 1) / 2;
        default: return 0;
    }
}

}  // namespace dba
