// How the work of one call is cut and handed out: by elements, not by tensors, in an order that is known beforehand.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace dba {

// A contiguous piece of a tensor seen as [rows, cols]: whole rows, or a part of one row.
struct Piece {
    int64_t row, rows, col, cols;
};

// The cut of one tensor into units, the smallest pieces that are handed out and the stretches that reductions add up
// first. It depends on the shape alone, so results do not depend on the number of threads.
struct Cut {
    int64_t rows, cols, units;

    // rowwise: groups end with the row, so that a ragged row must not be joined with the next one.
    Cut(int64_t rows, int64_t cols, bool rowwise);
    Piece piece(int64_t unit) const;
    // body(row, column, n) for every row of units begin .. end, or the part of it that is theirs, as one stretch.
    template <class Body> void each_row(int64_t begin, int64_t end, Body&& body) const {
        for (int64_t unit = begin; unit < end;) {
            Piece whole = piece(unit);
            while (++unit < end && unit % units_per_row_ != 0) whole.cols += piece(unit).cols;
            for (int64_t row = whole.row; row < whole.row + whole.rows; ++row) body(row, whole.col, whole.cols);
        }
    }

private:
    int64_t units_per_row_, rows_per_unit_;
};

// All units of all tensors, numbered through.
class Units {
public:
    explicit Units(std::vector<Cut> cuts);
    int64_t tensors() const { return static_cast<int64_t>(cuts_.size()); }
    int64_t first(int64_t tensor) const { return first_[tensor]; }  // first(tensors()) is the number of units
    const Cut& cut(int64_t tensor) const { return cuts_[tensor]; }
    int64_t tensor_of(int64_t unit) const;

private:
    std::vector<Cut> cuts_;
    std::vector<int64_t> first_;
};

// Stages run one after the other, the tasks of one stage in parallel. Tasks are claimed in order, and a thread that finds
// its task's stage closed waits for tasks that other threads are already running: no deadlock, and no waking up of threads
// between stages.
class Tasks {
public:
    using Run = std::function<void(int64_t tensor, int64_t begin, int64_t end)>;  // units of it, numbered through

    // A stage of one serial task.
    void serial(std::function<void()> work);
    // A stage over the units of tensors begin .. end, about elements_per_task elements each.
    void parallel(const Units& units, int64_t begin, int64_t end, int64_t elements_per_task, const Run& run);
    void execute(int threads);

private:
    struct Task {
        int64_t after;  // tasks that must have finished before this one may start
        std::function<void()> work;
    };
    std::vector<Task> tasks_;
    int64_t widest_ = 1;  // tasks of the largest stage: more threads than that would only wait
};

}  // namespace dba
