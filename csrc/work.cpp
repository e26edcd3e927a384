#include "work.h"

#include <algorithm>
#include <atomic>
#include <thread>

#include "formats.h"
#include "pool.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace dba {
namespace {

constexpr int64_t UNIT = 8192;  // elements; a multiple of GROUP
static_assert(UNIT % GROUP == 0);

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void relax(int round) {
    if (round > 2000) return std::this_thread::yield();  // more threads than free cores
#if defined(__x86_64__)
    _mm_pause();
#endif
}

}  // namespace

Cut::Cut(int64_t r, int64_t c, bool rowwise) : rows(r), cols(c) {
    if (!rowwise || c % GROUP == 0) {  // rows join without a seam
        rows = r * c > 0;
        cols = r * c;
    }
    const bool long_rows = cols > UNIT;
    units_per_row_ = long_rows ? ceil_div(cols, UNIT) : 1;
    rows_per_unit_ = long_rows || cols == 0 ? 1 : UNIT / cols;
    units = cols == 0 ? 0 : long_rows ? rows * units_per_row_ : ceil_div(rows, rows_per_unit_);
}

Piece Cut::piece(int64_t unit) const {
    if (units_per_row_ == 1) {
        const int64_t row = unit * rows_per_unit_;
        return {row, std::min(rows_per_unit_, rows - row), 0, cols};
    }
    const int64_t col = unit % units_per_row_ * UNIT;
    return {unit / units_per_row_, 1, col, std::min(UNIT, cols - col)};
}

Units::Units(std::vector<Cut> cuts) : cuts_(std::move(cuts)), first_{0} {
    for (const Cut& cut : cuts_) first_.push_back(first_.back() + cut.units);
}

int64_t Units::tensor_of(int64_t unit) const {
    return std::upper_bound(first_.begin(), first_.end(), unit) - first_.begin() - 1;
}

void Tasks::serial(std::function<void()> work) {
    tasks_.push_back({static_cast<int64_t>(tasks_.size()), std::move(work)});
}

void Tasks::parallel(const Units& units, int64_t begin, int64_t end, int64_t elements_per_task, const Run& run) {
    const int64_t after = static_cast<int64_t>(tasks_.size()), last = units.first(end);
    for (int64_t unit = units.first(begin); unit < last;) {
        const int64_t start = unit;
        int64_t tensor = units.tensor_of(unit);
        for (int64_t elements = 0; unit < last && elements < elements_per_task; ++unit) {
            while (unit >= units.first(tensor + 1)) ++tensor;
            const Piece piece = units.cut(tensor).piece(unit - units.first(tensor));
            elements += piece.rows * piece.cols;
        }
        tasks_.push_back({after, [&units, &run, start, stop = unit] {
                              int64_t tensor = units.tensor_of(start);
                              for (int64_t u = start, end; u < stop; u = end, ++tensor) {
                                  end = std::min(stop, units.first(tensor + 1));
                                  if (u < end) run(tensor, u, end);
                              }
                          }});
    }
    widest_ = std::max(widest_, static_cast<int64_t>(tasks_.size()) - after);
}

void Tasks::execute(int threads) {
    const int64_t count = static_cast<int64_t>(tasks_.size());
    std::atomic<int64_t> next{0}, finished{0};
    run_on_threads(static_cast<int>(std::min<int64_t>(threads, widest_)), [&] {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
            for (int round = 0; finished.load(std::memory_order_acquire) < tasks_[i].after; ++round) relax(round);
            tasks_[i].work();
            finished.fetch_add(1, std::memory_order_acq_rel);
        }
    });
}

}  // namespace dba
