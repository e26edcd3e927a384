#include "api.h"

#include <cmath>
#include <vector>

#include "kernels.h"
#include "model.h"
#include "work.h"

using namespace dba;

namespace {

constexpr int64_t ELEMENTS_PER_TASK = 262144;  // long stretches: a thread that begins one finds no prefetched line
constexpr int64_t ELEMENTS_PER_WAVE = 1 << 18;  // small tensors share a wave: its two barriers cost microseconds

const Kernels& kernels_of(int64_t isa) {
#if defined(__x86_64__)
    if (isa == 2) return avx512_kernels;
    if (isa == 1) return avx2_kernels;
#endif
    (void)isa;
    return scalar_kernels;
}

}  // namespace

int64_t dba_abi(void) { return 2; }

int64_t dba_isa_usable(int64_t isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == 2)
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == 1) return avx2;
#endif
    return isa == 0;
}

void dba_accumulate(int64_t isa, int64_t threads, const Tensor* tensors, int64_t count, double weight,
                    double* squared_norms) {
    const Kernels& kernels = kernels_of(isa);
    const Batch batch{count, FP32, NATIVE, STATE_FP32, GLOBAL_NONE, tensors};
    Model model(kernels, &batch, 1);
    const Tasks::Run square = [&](int64_t tensor, int64_t begin, int64_t end) { model.reduce(tensor, begin, end); };
    const Tasks::Run add = [&](int64_t tensor, int64_t begin, int64_t end) {
        if (!std::isfinite(squared_norms[tensor])) return;
        model.each_row(tensor, begin, end, [&](int64_t row, int64_t col, int64_t n) {
            const Tensor& t = tensors[tensor];
            const int64_t start = row * model.cols(tensor) + col;
            kernels.accumulate[t.grad_dtype](t.grad + start * dtype_bytes(t.grad_dtype),
                                             reinterpret_cast<float*>(t.param) + start, static_cast<float>(weight), n);
        });
    };
    // Wave by wave: the sum reads from the cache what the norm has just read.
    Tasks tasks;
    model.each_wave(ELEMENTS_PER_WAVE, [&](int64_t begin, int64_t end) {
        tasks.parallel(model.units(), begin, end, ELEMENTS_PER_TASK, square);
        tasks.serial([&, begin, end] {
            for (int64_t i = begin; i < end; ++i) {
                const double squared_norm = model.total(i).grad_sq;
                squared_norms[i] = squared_norm <= SQUARED_NORM_LIMIT ? squared_norm : HUGE_VAL;  // NaN too
            }
        });
        tasks.parallel(model.units(), begin, end, ELEMENTS_PER_TASK, add);
    });
    tasks.execute(static_cast<int>(threads));
}

void dba_encode(int64_t isa, int64_t threads, int64_t dtype, int64_t format, int64_t rows, int64_t cols,
                const uint8_t* source, uint8_t* codes, float* scales) {
    const Units units({Cut(rows, cols, true)});
    const Rows layout{units.cut(0).cols};
    Kernels::Encode* encode = kernels_of(isa).encode[dtype][format];
    const Tasks::Run run = [&](int64_t, int64_t begin, int64_t end) {
        units.cut(0).each_row(begin, end, [&](int64_t row, int64_t col, int64_t n) {
            encode(source + (row * layout.cols + col) * dtype_bytes(dtype), codes + layout.code(format, row, col),
                   scales + layout.scale(row, col), n);
        });
    };
    Tasks tasks;
    tasks.parallel(units, 0, 1, ELEMENTS_PER_TASK, run);
    tasks.execute(static_cast<int>(threads));
}

void dba_decode(int64_t isa, int64_t threads, int64_t dtype, int64_t format, int64_t rows, int64_t cols,
                const uint8_t* codes, const float* scales, uint8_t* out) {
    const Units units({Cut(rows, cols, global_is_grouped(format))});
    const Rows layout{units.cut(0).cols};
    Kernels::Decode* decode = kernels_of(isa).decode[format][dtype];
    const Tasks::Run run = [&](int64_t, int64_t begin, int64_t end) {
        units.cut(0).each_row(begin, end, [&](int64_t row, int64_t col, int64_t n) {
            decode(codes + layout.code(format, row, col), scales + (scales ? layout.scale(row, col) : 0),
                   out + (row * layout.cols + col) * dtype_bytes(dtype), n);
        });
    };
    Tasks tasks;
    tasks.parallel(units, 0, 1, ELEMENTS_PER_TASK, run);
    tasks.execute(static_cast<int>(threads));
}

void dba_similarity(int64_t isa, int64_t threads, const Batch* batches, int64_t count, double* sums) {
    Model model(kernels_of(isa), batches, count);
    const Tasks::Run run = [&](int64_t tensor, int64_t begin, int64_t end) { model.reduce(tensor, begin, end); };
    Tasks tasks;
    tasks.parallel(model.units(), 0, model.tensors(), ELEMENTS_PER_TASK, run);
    tasks.execute(static_cast<int>(threads));
    for (int64_t i = 0; i < model.tensors(); ++i) model.write_sums(i, sums);
}

void dba_displacement(int64_t isa, int64_t threads, int64_t dtype, int64_t param_format, int64_t n,
                      const uint8_t* param, const uint8_t* remainder, const uint8_t* origin, float* out) {
    const Units units({Cut(1, n, true)});
    Kernels::Displacement* displacement = kernels_of(isa).displacement[param_format][dtype];
    const Tasks::Run run = [&](int64_t, int64_t begin, int64_t end) {
        units.cut(0).each_row(begin, end, [&](int64_t, int64_t col, int64_t n) {
            const int64_t at = col * dtype_bytes(dtype);
            displacement(param + at, remainder + col * remainder_bytes(param_format), origin + at, out + col, n);
        });
    };
    Tasks tasks;
    tasks.parallel(units, 0, 1, ELEMENTS_PER_TASK, run);
    tasks.execute(static_cast<int>(threads));
}

void dba_coefficients(const CoefficientArguments* arguments) {
    Coefficients coefficients(*arguments);
    coefficients.begin();
    for (int64_t i = 0; i < arguments->active_count; ++i) coefficients.row(arguments->active[i]);
}

void dba_step(int64_t isa, int64_t threads, const Batch* batches, int64_t count, const double* table) {
    Model model(kernels_of(isa), batches, count);
    const Tasks::Run run = [&](int64_t tensor, int64_t begin, int64_t end) { model.step(tensor, begin, end, table); };
    Tasks tasks;
    tasks.parallel(model.units(), 0, model.tensors(), ELEMENTS_PER_TASK, run);
    tasks.execute(static_cast<int>(threads));
}

// A non-finite gradient anywhere must leave everything untouched, and clipping needs the norm of the whole gradient: so the
// sums of every tensor come first. Taking <g_D, g_G> of a tensor only right before its step, from the cache, would save a
// byte per parameter; measured, its barriers and shorter stretches cost more.
void dba_fused_step(int64_t isa, int64_t threads, const Batch* batches, int64_t count,
                    const CoefficientArguments* arguments) {
    Model model(kernels_of(isa), batches, count);
    Coefficients coefficients(*arguments);
    const Tasks::Run reduce = [&](int64_t tensor, int64_t begin, int64_t end) { model.reduce(tensor, begin, end); };
    const Tasks::Run step = [&](int64_t tensor, int64_t begin, int64_t end) {
        model.step(tensor, begin, end, arguments->table);
    };

    Tasks tasks;
    if (arguments->reduce) tasks.parallel(model.units(), 0, model.tensors(), ELEMENTS_PER_TASK, reduce);
    tasks.serial([&] {
        if (arguments->reduce)
            for (int64_t i = 0; i < model.tensors(); ++i) model.write_sums(i, arguments->sums);
        coefficients.begin();
        for (int64_t i = 0; i < model.tensors(); ++i) coefficients.row(model.index(i));
    });
    tasks.parallel(model.units(), 0, model.tensors(), ELEMENTS_PER_TASK, step);
    tasks.execute(static_cast<int>(threads));
}
