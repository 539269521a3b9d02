// What lies between the products of a block: RMS norm, the gate and the softmax of the loss, forward and backward.
//
// Sums go in float32 and in an order that does not depend on the number of threads. Letters: N tokens, D width, F width of the
// gate, V vocabulary.
#pragma once
#include <algorithm>
#include <vector>

#include "tiles.h"

namespace kajiya {

constexpr int64_t kSpans = 32;  // parts that sums over tokens are made in

inline int64_t span_begin(int64_t n, int64_t span) { return n * span / kSpans; }

// A norm's width, and what it adds to its weight: 0, or 1 where weights are kept as their distance from 1 (Gemma).
struct Norm {
    int64_t D;
    float eps, shift;
};

// y = x · rsqrt(mean x² + eps) · weight of one row, and its factor; x is rounded before the weight multiplies it, as Transformers does
// of a weight that nothing is added to.
template <class E>
inline float norm_row(Norm norm, const E* row, const E* weight, E* out) {
    Floats squares{};
    for (int64_t d = 0; d < norm.D; d += kLanes) {
        Floats value = load_element(row + d);
        squares += value * value;
    }
    float scale = 1.0f / std::sqrt(sum(squares) / float(norm.D) + norm.eps);
    for (int64_t d = 0; d < norm.D; d += kLanes) {
        Floats value = load_element(row + d) * scale;
        if (norm.shift == 0) value = rounded<E>(value);
        store_element(out + d, value * (load_element(weight + d) + norm.shift));
    }
    return scale;
}

// The gradient of one row; what it adds to the weight's goes to `own` where that is not null.
template <class E>
inline void norm_row_backward(Norm norm, const E* row, const E* weight, float scale, const E* grad, E* grad_row, float* own) {
    Floats along{};
    for (int64_t d = 0; d < norm.D; d += kLanes) {
        Floats value = load_element(row + d) * scale, slope = load_element(grad + d);
        along += slope * (load_element(weight + d) + norm.shift) * value;
        if (own) store(own + d, load<Floats>(own + d) + slope * value);
    }
    float mean = sum(along) / float(norm.D);
    for (int64_t d = 0; d < norm.D; d += kLanes) {
        Floats value = load_element(row + d) * scale, slope = load_element(grad + d);
        store_element(grad_row + d, (slope * (load_element(weight + d) + norm.shift) - value * mean) * scale);
    }
}

template <class E>
void norm_forward(int64_t N, Norm norm, const E* x, const E* weight, E* y, float* scales, int64_t n_threads) {
#pragma omp parallel for num_threads(n_threads)
    for (int64_t t = 0; t < N; ++t) scales[t] = norm_row(norm, x + t * norm.D, weight, y + t * norm.D);
}

inline void add_spans(const std::vector<float>& partial, int64_t D, float* total) {
    for (int64_t d = 0; d < D; ++d) {
        total[d] = 0;
        for (int64_t span = 0; span < kSpans; ++span) total[d] += partial[span * D + d];
    }
}

// grad_weight is float32 [D], or null where it is not wanted.
template <class E>
void norm_backward(int64_t N, Norm norm, const E* x, const E* weight, const float* scales, const E* grad_y, E* grad_x,
                   float* grad_weight, int64_t n_threads) {
    int64_t D = norm.D;
    std::vector<float> partial(grad_weight ? kSpans * D : 0);
#pragma omp parallel for num_threads(n_threads)
    for (int64_t span = 0; span < kSpans; ++span) {
        float* own = grad_weight ? partial.data() + span * D : nullptr;
        for (int64_t t = span_begin(N, span); t < span_begin(N, span + 1); ++t)
            norm_row_backward(norm, x + t * D, weight, scales[t], grad_y + t * D, grad_x + t * D, own);
    }
    if (grad_weight) add_spans(partial, D, grad_weight);
}

// Heads side by side, [N, Q + 2K, D]: queries and keys are normed, each kind with a weight of its own, [2, D]; values stay.
struct HeadNorms {
    int64_t N, Q, K;
    Norm norm;
    int64_t n_threads;
};

template <class E>
void head_norms_forward(const HeadNorms& x, const E* heads, const E* weights, E* y, float* scales) {
    int64_t D = x.norm.D, normed = x.Q + x.K, all = normed + x.K;
#pragma omp parallel for num_threads(x.n_threads)
    for (int64_t t = 0; t < x.N; ++t) {
        const E* from = heads + t * all * D;
        E* to = y + t * all * D;
        for (int64_t a = 0; a < normed; ++a)
            scales[t * normed + a] = norm_row(x.norm, from + a * D, weights + (a < x.Q ? 0 : D), to + a * D);
        std::copy(from + normed * D, from + all * D, to + normed * D);
    }
}

// grad_weights is float32 [2, D].
template <class E>
void head_norms_backward(const HeadNorms& x, const E* heads, const E* weights, const float* scales, const E* grad_y, E* grad_heads,
                         float* grad_weights) {
    int64_t D = x.norm.D, normed = x.Q + x.K, all = normed + x.K;
    std::vector<float> partial(kSpans * 2 * D);
#pragma omp parallel for num_threads(x.n_threads)
    for (int64_t span = 0; span < kSpans; ++span) {
        for (int64_t t = span_begin(x.N, span); t < span_begin(x.N, span + 1); ++t) {
            int64_t at = t * all * D;
            for (int64_t a = 0; a < normed; ++a, at += D) {
                int64_t kind = a < x.Q ? 0 : D;
                norm_row_backward(x.norm, heads + at, weights + kind, scales[t * normed + a], grad_y + at, grad_heads + at,
                                  partial.data() + span * 2 * D + kind);
            }
            std::copy(grad_y + at, grad_y + at + x.K * D, grad_heads + at);
        }
    }
    add_spans(partial, 2 * D, grad_weights);
}

inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// Gates are g · sigmoid(z(g)): `of` is z, `slope` its derivative.
struct Silu {
    static Floats of(Floats g) { return g; }
    static Floats slope(Floats g) { return all(1.0f); }
};

// GELU by a hyperbolic tangent (Hendrycks & Gimpel, arXiv:1606.08415): (1 + tanh u) / 2 = sigmoid(2 u).
struct Gelu {
    static constexpr float kTwice = 1.5957691216057308f, kCube = 0.044715f;  // 2 √(2 / π)
    static Floats of(Floats g) { return kTwice * (g + kCube * g * g * g); }
    static Floats slope(Floats g) { return kTwice * (1.0f + 3.0f * kCube * g * g); }
};

// y = gate(g) · up; g and up are the halves of a row of both [N, 2F].
template <class Gate, class E>
void gated_forward(int64_t N, int64_t F, const E* both, E* y, int64_t n_threads) {
#pragma omp parallel for num_threads(n_threads)
    for (int64_t t = 0; t < N; ++t) {
        const E *gate = both + t * 2 * F, *up = gate + F;
        for (int64_t f = 0; f < F; f += kLanes) {
            Floats g = load_element(gate + f);
            store_element(y + t * F + f, rounded<E>(g * sigmoid(Gate::of(g))) * load_element(up + f));
        }
    }
}

// The gradient of both halves [N, 2F], and y once more where it is not null.
template <class Gate, class E>
void gated_backward(int64_t N, int64_t F, const E* both, const E* grad_y, E* grad_both, E* y, int64_t n_threads) {
#pragma omp parallel for num_threads(n_threads)
    for (int64_t t = 0; t < N; ++t) {
        const E *gate = both + t * 2 * F, *up = gate + F;
        E* to = grad_both + t * 2 * F;
        for (int64_t f = 0; f < F; f += kLanes) {
            Floats g = load_element(gate + f), u = load_element(up + f), slope = load_element(grad_y + t * F + f);
            Floats s = sigmoid(Gate::of(g)), gated = g * s;
            store_element(to + f, slope * u * s * (1.0f + g * (1.0f - s) * Gate::slope(g)));
            store_element(to + F + f, slope * gated);
            if (y) store_element(y + t * F + f, rounded<E>(gated) * u);
        }
    }
}

// A block of the vocabulary for all tokens, words first: logits [V, N], N a multiple of kLanes.
struct Sums {
    int64_t V, N;
    float* largest;  // [N]: the largest logit of each token so far
    double* total;   // [N]: Σ exp(logit − largest) so far
    int64_t n_threads;
};

// The running maximum and sum of each token's softmax, one block further (Milakov & Gimelshein, arXiv:1805.02867, algorithm 3).
template <class E>
void softmax_sums(const Sums& x, const E* logits) {
    constexpr int64_t kTogether = 8, kWords = 64;  // groups of tokens at once; words whose terms are summed in single precision
    int64_t groups = x.N / kLanes, spans = (groups + kTogether - 1) / kTogether;
#pragma omp parallel for num_threads(x.n_threads)
    for (int64_t span = 0; span < spans; ++span) {
        int64_t first = span * kTogether * kLanes, n = std::min(kTogether, groups - span * kTogether);
        const E* from = logits + first;
        Floats top[kTogether], part[kTogether];
        for (int64_t g = 0; g < n; ++g) top[g] = load<Floats>(x.largest + first + g * kLanes);
        for (int64_t v = 0; v < x.V; ++v)
            for (int64_t g = 0; g < n; ++g) top[g] = larger(load_element(from + v * x.N + g * kLanes), top[g]);
        for (int64_t g = 0; g < n; ++g)
            for (int64_t i = 0; i < kLanes; ++i) {
                int64_t t = first + g * kLanes + i;
                x.total[t] *= std::exp(double(x.largest[t]) - top[g][i]);
                x.largest[t] = top[g][i];
            }
        for (int64_t begin = 0; begin < x.V; begin += kWords) {
            for (int64_t g = 0; g < n; ++g) part[g] = Floats{};
            for (int64_t v = begin; v < std::min(x.V, begin + kWords); ++v)
                for (int64_t g = 0; g < n; ++g) part[g] += exponential(load_element(from + v * x.N + g * kLanes) - top[g]);
            for (int64_t g = 0; g < n; ++g)
                for (int64_t i = 0; i < kLanes; ++i) x.total[first + g * kLanes + i] += part[g][i];
        }
    }
}

struct Entropy {
    int64_t N, V;
    const int64_t* targets;  // [N], any negative number where there is none
    const float* weights;    // [N]
    float z_loss, smoothing;
    double* sums;  // [2]: Σ weight · (−log p), and what z-loss and smoothing add
    int64_t n_threads;
};

// Logits [N, V] become the gradient of Σ weight · (smoothed −log p + z_loss · log²Z), in place.
template <class E>
void entropy(const Entropy& x, E* logits, bool needs_grad) {
    std::vector<double> partial(2 * kSpans);
#pragma omp parallel for num_threads(x.n_threads) schedule(dynamic)
    for (int64_t span = 0; span < kSpans; ++span) {
        std::vector<float> terms(x.V);  // of one token
        for (int64_t t = span_begin(x.N, span); t < span_begin(x.N, span + 1); ++t) {
            E* row = logits + t * x.V;
            float weight = x.targets[t] < 0 ? 0.0f : x.weights[t];
            if (weight == 0.0f) {
                if (needs_grad) std::memset((void*)row, 0, x.V * sizeof(E));
                continue;
            }
            Floats top = all(-INFINITY), total{}, plain{};
            for (int64_t v = 0; v < x.V; v += kLanes) top = larger(load_element(row + v), top);
            float peak = largest(top);
            for (int64_t v = 0; v < x.V; v += kLanes) {
                Floats value = load_element(row + v), term = exponential(value - peak);
                store(terms.data() + v, term);
                total += term;
                plain += value;
            }
            float denominator = sum(total), log_z = peak + std::log(denominator);
            E at[kLanes] = {row[x.targets[t]]};
            float chosen = load_element(at)[0] - log_z;
            partial[2 * span] -= double(weight) * chosen;
            if (x.smoothing != 0)
                partial[2 * span + 1] += double(weight) * x.smoothing * (chosen - (sum(plain) / float(x.V) - log_z));
            if (x.z_loss != 0) partial[2 * span + 1] += double(weight) * x.z_loss * log_z * log_z;
            if (!needs_grad) continue;
            float factor = weight * (1.0f + 2.0f * x.z_loss * log_z) / denominator, less = weight * x.smoothing / float(x.V);
            for (int64_t v = 0; v < x.V; v += kLanes)
                store_element(row + v, load<Floats>(terms.data() + v) * factor - less);
            // The target's own gradient is made from its logit once more, not from the rounded value.
            E made[kLanes];
            float own = std::exp(chosen) * weight * (1.0f + 2.0f * x.z_loss * log_z) - less + weight * (x.smoothing - 1.0f);
            store_element(made, all(own));
            row[x.targets[t]] = made[0];
        }
    }
    for (int64_t span = 0; span < kSpans; ++span) {
        x.sums[0] += partial[2 * span];
        x.sums[1] += partial[2 * span + 1];
    }
}

}  // namespace kajiya
