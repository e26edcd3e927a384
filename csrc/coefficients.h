// From sums to the coefficient table (METHOD eqs. 2, 4, 5): plain double arithmetic on one row per parameter.
#pragma once

#include <cstdint>

namespace dba {

// Columns of the tables; the same numbers as in dba_kernels/formats.py.
enum Column {
    GRAD_WEIGHT,
    GLOBAL_WEIGHT,
    BETA1,
    ONE_MINUS_BETA1,
    BETA2,
    ONE_MINUS_BETA2,
    STEP_SIZE,
    INV_SQRT_BIAS_CORRECTION2,
    EPS,
    LR_WEIGHT_DECAY,
    STEP,
    SKIP,
    COLUMNS
};
enum HyperColumn { HYPER_LR, HYPER_BETA1, HYPER_BETA2, HYPER_EPS, HYPER_WEIGHT_DECAY, HYPER_SIGN, HYPER_COLUMNS };
enum SummaryEntry { SUMMARY_GAMMA, SUMMARY_CLIP_FACTOR, SUMMARY_GRAD_NORM, SUMMARY_GLOBAL_NORM };
enum Correction : int64_t { CORRECTION_COSINE, CORRECTION_NONE, CORRECTION_AGEM, CORRECTION_PCGRAD };

// Arguments of one call; pointers and numbers as native.py fills them in, eight bytes each.
struct CoefficientArguments {
    double* sums;             // [n, 2]: <g_D, g_G> and |g_D|^2
    const double* global_sq;  // [n]; -1: no global gradient
    const double* hyper;      // [groups, HYPER_COLUMNS]
    const int64_t* group;     // [n]
    const int64_t* active;    // [m]
    int64_t active_count;
    float* steps;              // [n]
    double* bias_corrections;  // [n, 2]
    int64_t* counters;         // [2]
    double* table;             // [n, COLUMNS]
    double* report;            // [n, 2]
    double* summary;           // [4]
    double boost, total_steps, boost_max, alpha_min, alpha_max;
    double max_grad_norm;  // infinite: no clipping
    int64_t correction, global_scope, reduce;
    double loss_scale;
    int64_t found_inf;
    const double* gamma_override;  // scalar or null
    const double* alpha_override;  // [n] or null
};

class Coefficients {
public:
    explicit Coefficients(const CoefficientArguments& arguments) : in_(arguments) {}

    // Skip or not, clip factor, gamma, counters. Needs |g_D|^2 of every active parameter, and where the scope is global
    // their dots as well.
    void begin();
    // The row of one active parameter. Needs its dot.
    void row(int64_t index);
    bool skips() const { return skip_; }

private:
    struct Projection {
        double dot, grad_sq, global_sq;
    };
    Projection projection(int64_t index) const;  // unscaled and clipped
    void global_projection();

    const CoefficientArguments& in_;
    bool skip_ = false;
    double clip_ = 1.0, gamma_ = 0.0;
    Projection whole_{};
};

}  // namespace dba
