#include "coefficients.h"

#include <algorithm>
#include <cmath>

#include "formats.h"

namespace dba {
namespace {

const double* hyper_of(const CoefficientArguments& in, int64_t index) {
    return in.hyper + in.group[index] * HYPER_COLUMNS;
}

double inverse_scale(const CoefficientArguments& in, int64_t index) {
    return hyper_of(in, index)[HYPER_SIGN] / in.loss_scale;
}

double clamp(double x, double low, double high) { return std::min(std::max(x, low), high); }

// eq. 4; 0 if either norm is 0
double cosine(double dot, double grad_sq, double global_sq) {
    const double norms = std::sqrt(grad_sq) * std::sqrt(global_sq);
    return norms > 0.0 ? clamp(dot / norms, -1.0, 1.0) : 0.0;
}

// eq. 2, clamped to [0, boost_max]; 0 for t >= T
double gamma(const CoefficientArguments& in) {
    if (in.gamma_override) return *in.gamma_override;
    if (in.total_steps == 0.0) return 0.0;
    const double remaining = 1.0 - static_cast<double>(in.counters[0]) / in.total_steps;
    return clamp(in.boost * remaining, 0.0, in.boost_max);
}

}  // namespace

Coefficients::Projection Coefficients::projection(int64_t index) const {
    const double scale = inverse_scale(in_, index);
    const double global_sq = std::max(in_.global_sq[index], 0.0);
    if (!in_.reduce) return {0.0, 0.0, global_sq};
    const double* sums = in_.sums + 2 * index;
    return {sums[0] * scale * clip_, sums[1] * scale * scale * clip_ * clip_, global_sq};
}

void Coefficients::global_projection() {
    for (int64_t i = 0; i < in_.active_count; ++i) {
        const int64_t index = in_.active[i];
        if (in_.global_sq[index] < 0.0) continue;
        const Projection p = projection(index);
        whole_.dot += p.dot;
        whole_.grad_sq += p.grad_sq;
        whole_.global_sq += p.global_sq;
    }
}

void Coefficients::begin() {
    double grad_sq = 0.0, global_sq = 0.0;
    skip_ = in_.found_inf != 0;
    for (int64_t i = 0; i < in_.active_count; ++i) {
        const int64_t index = in_.active[i];
        global_sq += std::max(in_.global_sq[index], 0.0);
        if (!in_.reduce) continue;
        const double scale = inverse_scale(in_, index);
        const double raw_sq = in_.sums[2 * index + 1], its_sq = raw_sq * scale * scale;
        skip_ |= !(raw_sq <= SQUARED_NORM_LIMIT && its_sq <= SQUARED_NORM_LIMIT);  // true for NaN
        grad_sq += its_sq;
    }
    const double norm = std::sqrt(grad_sq);
    if (in_.reduce && std::isfinite(in_.max_grad_norm)) {
        const double factor = in_.max_grad_norm / (norm + 1e-6);
        clip_ = factor < 1.0 || std::isnan(factor) ? factor : 1.0;
    }
    gamma_ = gamma(in_);
    if (in_.global_scope) global_projection();
    ++in_.counters[skip_ ? 1 : 0];
    in_.summary[SUMMARY_GAMMA] = gamma_;
    in_.summary[SUMMARY_CLIP_FACTOR] = clip_;
    in_.summary[SUMMARY_GRAD_NORM] = norm;
    in_.summary[SUMMARY_GLOBAL_NORM] = std::sqrt(global_sq);
}

void Coefficients::row(int64_t index) {
    const bool has_global = in_.global_sq[index] >= 0.0;
    const Projection p = in_.global_scope ? whole_ : projection(index);
    const double* hyper = hyper_of(in_, index);

    double a = 1.0, b = 0.0, alpha = 1.0, phi = 0.0;  // plain AdamW where there is no global gradient
    if (has_global) {
        phi = cosine(p.dot, p.grad_sq, p.global_sq);
        a = 1.0 - gamma_;
        b = gamma_;
        const double conflict = std::min(p.dot, 0.0);
        if (in_.correction == CORRECTION_AGEM || in_.correction == CORRECTION_PCGRAD) {
            const double onto_global = p.global_sq > 0.0 ? conflict / p.global_sq : 0.0;
            const double onto_grad = p.grad_sq > 0.0 ? conflict / p.grad_sq : 0.0;
            const bool agem = in_.correction == CORRECTION_AGEM;
            a = agem ? 1.0 : 1.0 - onto_grad;
            b = agem ? -onto_global : 1.0 - onto_global;
        } else if (in_.alpha_override) {
            alpha = in_.alpha_override[index];
        } else if (in_.correction == CORRECTION_COSINE) {
            alpha = clamp(1.0 - phi, in_.alpha_min, in_.alpha_max);  // eq. 5: our reading of the paper's eq. 9
        }
    }

    double* bias = in_.bias_corrections + 2 * index;
    if (!skip_) {
        in_.steps[index] += 1.0f;
        bias[0] = hyper[HYPER_BETA1] * bias[0] + (1.0 - hyper[HYPER_BETA1]);
        bias[1] = hyper[HYPER_BETA2] * bias[1] + (1.0 - hyper[HYPER_BETA2]);
    }
    double* row = in_.table + index * COLUMNS;
    row[GRAD_WEIGHT] = a * clip_ * inverse_scale(in_, index);
    row[GLOBAL_WEIGHT] = b;
    row[BETA1] = hyper[HYPER_BETA1];
    row[ONE_MINUS_BETA1] = 1.0 - hyper[HYPER_BETA1];
    row[BETA2] = hyper[HYPER_BETA2];
    row[ONE_MINUS_BETA2] = 1.0 - hyper[HYPER_BETA2];
    row[STEP_SIZE] = hyper[HYPER_LR] * alpha / bias[0];
    row[INV_SQRT_BIAS_CORRECTION2] = 1.0 / std::sqrt(bias[1]);
    row[EPS] = hyper[HYPER_EPS];
    row[LR_WEIGHT_DECAY] = hyper[HYPER_LR] * hyper[HYPER_WEIGHT_DECAY];
    row[STEP] = in_.steps[index];
    row[SKIP] = skip_ ? 1.0 : 0.0;
    in_.report[2 * index] = phi;
    in_.report[2 * index + 1] = alpha;
}

}  // namespace dba
