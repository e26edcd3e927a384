#include "model.h"

#include <algorithm>

namespace dba {
namespace {

std::vector<Cut> cuts_of(const Batch* batches, int64_t count) {
    std::vector<Cut> cuts;
    for (const Batch* b = batches; b < batches + count; ++b) {
        const bool rowwise = b->state_format == STATE_INT8 || global_is_grouped(b->global_format);
        for (int64_t i = 0; i < b->count; ++i) cuts.emplace_back(b->tensors[i].rows, b->tensors[i].cols, rowwise);
    }
    return cuts;
}

StepScalars scalars_of(const double* row, uint64_t seed) {
    auto narrow = [row](Column column) { return static_cast<float>(row[column]); };
    return {narrow(GRAD_WEIGHT),
            narrow(GLOBAL_WEIGHT),
            narrow(BETA1),
            narrow(ONE_MINUS_BETA1),
            narrow(BETA2),
            narrow(ONE_MINUS_BETA2),
            narrow(STEP_SIZE),
            narrow(INV_SQRT_BIAS_CORRECTION2),
            narrow(EPS),
            narrow(LR_WEIGHT_DECAY),
            static_cast<uint32_t>(static_cast<int64_t>(row[STEP])),
            static_cast<uint32_t>(seed)};
}

}  // namespace

Model::Model(const Kernels& kernels, const Batch* batches, int64_t count)
    : kernels_(kernels), units_(cuts_of(batches, count)), sums_(units_.first(units_.tensors())) {
    for (const Batch* b = batches; b < batches + count; ++b)
        for (int64_t i = 0; i < b->count; ++i) entries_.push_back({b, b->tensors + i});
}

GradSource Model::source(const Entry& entry, const Rows& layout, int64_t row, int64_t col) const {
    const Tensor& t = *entry.tensor;
    const int64_t format = entry.batch->global_format;
    return {t.grad + (row * layout.cols + col) * dtype_bytes(t.grad_dtype),
            t.global_codes + layout.code(format, row, col),
            t.global_scales + (global_is_grouped(format) ? layout.scale(row, col) : 0)};
}

StepTarget Model::target(const Entry& entry, const Rows& layout, int64_t row, int64_t col) const {
    const Tensor& t = *entry.tensor;
    const Batch& b = *entry.batch;
    const int64_t i = row * layout.cols + col, group = b.state_format == STATE_INT8 ? layout.scale(row, col) : 0;
    return {t.param + i * dtype_bytes(b.dtype),
            t.remainder + i * remainder_bytes(b.param_format),
            t.exp_avg + i * state_bytes(b.state_format),
            t.exp_avg_sq + i * state_bytes(b.state_format),
            t.exp_avg_scales + group,
            t.exp_avg_sq_scales + group};
}

void Model::reduce(int64_t tensor, int64_t begin, int64_t end) {
    const Entry& entry = entries_[tensor];
    const Rows layout{units_.cut(tensor).cols};
    Kernels::Similarity* kernel = kernels_.similarity[entry.tensor->grad_dtype][entry.batch->global_format];
    for (int64_t unit = begin; unit < end; ++unit) {
        Sums sums{};
        each_row(tensor, unit, unit + 1,
                 [&](int64_t row, int64_t col, int64_t n) { kernel(source(entry, layout, row, col), n, sums); });
        sums_[unit] = sums;
    }
}

void Model::step(int64_t tensor, int64_t begin, int64_t end, const double* table) const {
    const Entry& entry = entries_[tensor];
    const double* row_of_table = table + entry.tensor->index * COLUMNS;
    if (row_of_table[SKIP] != 0.0) return;
    const Batch& b = *entry.batch;
    const StepScalars scalars = scalars_of(row_of_table, entry.tensor->seed);
    const Rows layout{units_.cut(tensor).cols};
    const int64_t grad_dtype = entry.tensor->grad_dtype;
    Kernels::Boost* boost = kernels_.boost[grad_dtype][b.global_format];
    Kernels::Step* step = kernels_.one_stage[b.param_format][b.dtype][b.state_format][grad_dtype][b.global_format];
    if (!step) step = kernels_.two_stage[b.param_format][b.dtype][b.state_format];
    each_row(tensor, begin, end, [&](int64_t row, int64_t col, int64_t n) {
        const uint64_t element = entry.tensor->offset + static_cast<uint64_t>(row * layout.cols + col);
        step(target(entry, layout, row, col), source(entry, layout, row, col), boost, scalars, element, n);
    });
}

Sums Model::total(int64_t tensor) const {
    Sums sum{};
    for (int64_t unit = units_.first(tensor); unit < units_.first(tensor + 1); ++unit) {
        sum.dot += sums_[unit].dot;
        sum.grad_sq += sums_[unit].grad_sq;
    }
    return sum;
}

void Model::write_sums(int64_t tensor, double* sums) const {
    const Sums sum = total(tensor);
    sums[2 * index(tensor)] = sum.dot;
    sums[2 * index(tensor) + 1] = sum.grad_sq;
}

}  // namespace dba
