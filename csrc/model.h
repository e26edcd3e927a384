// The tensors of one call, cut into units, and what kernels do to one unit.
#pragma once

#include <vector>

#include "api.h"
#include "kernels.h"
#include "work.h"

namespace dba {

// Addresses inside a tensor of rows of `cols` elements.
struct Rows {
    int64_t cols;

    int64_t scale(int64_t row, int64_t col) const { return row * ((cols + GROUP - 1) / GROUP) + col / GROUP; }
    int64_t code(int64_t format, int64_t row, int64_t col) const {  // in bytes
        return row * global_bytes(format, cols) + global_bytes(format, col);
    }
};

class Model {
public:
    Model(const Kernels& kernels, const Batch* batches, int64_t count);

    const Units& units() const { return units_; }
    int64_t tensors() const { return units_.tensors(); }
    int64_t index(int64_t tensor) const { return entries_[tensor].tensor->index; }
    int64_t cols(int64_t tensor) const { return units_.cut(tensor).cols; }
    int64_t elements(int64_t tensor) const { return units_.cut(tensor).rows * units_.cut(tensor).cols; }

    // body(begin, end) over consecutive runs of tensors with at least `elements` elements each.
    template <class Body> void each_wave(int64_t elements_per_wave, Body&& body) const {
        for (int64_t begin = 0, end = 0; begin < tensors(); begin = end) {
            for (int64_t sum = 0; end < tensors() && sum < elements_per_wave; ++end) sum += elements(end);
            body(begin, end);
        }
    }
    // body(row, column, n) for every row, or part of one, of units begin .. end of a tensor.
    template <class Body> void each_row(int64_t tensor, int64_t begin, int64_t end, Body&& body) const {
        const int64_t first = units_.first(tensor);
        units_.cut(tensor).each_row(begin - first, end - first, body);
    }

    void reduce(int64_t tensor, int64_t begin, int64_t end);  // keeps each unit's sums
    void step(int64_t tensor, int64_t begin, int64_t end, const double* table) const;
    Sums total(int64_t tensor) const;  // the sums of its units, in their order
    void write_sums(int64_t tensor, double* sums) const;

private:
    struct Entry {
        const Batch* batch;
        const Tensor* tensor;
    };
    GradSource source(const Entry& entry, const Rows& layout, int64_t row, int64_t col) const;
    StepTarget target(const Entry& entry, const Rows& layout, int64_t row, int64_t col) const;

    const Kernels& kernels_;
    std::vector<Entry> entries_;
    Units units_;
    std::vector<Sums> sums_;  // one per unit
};

}  // namespace dba
