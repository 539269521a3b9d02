// What is computed of each token alone: norms, rotation, gates, caps, the choice of the next token.
#pragma once
#include <algorithm>

#include "vectors.h"

namespace kajiya {

inline void normalize(const float* x, const float* weight, int64_t n, float epsilon, float* to) {
    Floats total{};
    float rest = 0;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        Floats v = load<Floats>(x + i);
        total += v * v;
    }
    for (int64_t j = i; j < n; ++j) rest += x[j] * x[j];
    float scale = 1.0f / std::sqrt((sum(total) + rest) / float(n) + epsilon);
    for (int64_t j = 0; j < n; ++j) to[j] = x[j] * scale * weight[j];
}

// Turns the first `width` coordinates of a head, by the cosines and sines of its position.
inline void rotate(float* head, const float* cos, const float* sin, int width) {
    int half = width / 2;
    for (int i = 0; i < half; ++i) {
        float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

// Gates g · sigmoid(of(g)): SiLU, and GELU by a hyperbolic tangent (Hendrycks & Gimpel, arXiv:1606.08415), since
// (1 + tanh u) / 2 = sigmoid(2 u).
struct SiLU {
    template <class Number>
    static Number of(Number g) {
        return g;
    }
};

struct GELUTanh {
    static constexpr float kTwice = 1.5957691216057308f, kCube = 0.044715f;  // 2 √(2 / π)
    template <class Number>
    static Number of(Number g) {
        return kTwice * (g + kCube * g * g * g);
    }
};

// The gate's function, times what goes up.
template <class Gate>
inline void activate(const float* g, const float* u, int64_t width, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        Floats v = load<Floats>(g + i);
        store(to + i, v / (1.0f + exponential(-Gate::of(v))) * load<Floats>(u + i));
    }
    for (; i < width; ++i) to[i] = g[i] / (1.0f + std::exp(-Gate::of(g[i]))) * u[i];
}

// Numbers held softly below `cap` in size: cap · tanh(x / cap).
inline Floats capped(Floats x, float cap) { return cap - 2.0f * cap / (exponential(x * (2.0f / cap)) + 1.0f); }

inline void cap_all(float* x, int64_t n, float cap) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(x + i, capped(load<Floats>(x + i), cap));
    if (i == n) return;
    float rest[kLanes] = {};
    std::memcpy(rest, x + i, 4 * (n - i));
    store(rest, capped(load<Floats>(rest), cap));
    std::memcpy(x + i, rest, 4 * (n - i));
}

// One row of logits: its largest entry's index and log-probability, and the logarithm of the sum of exponentials.
inline void choose(const float* x, int64_t vocab, int32_t* best, float* best_logprob, float* log_sum) {
    float peak = x[0];
    int32_t at = 0;
    bool is_finite = true;
    for (int64_t i = 0; i < vocab; i += 1024) {
        int64_t end = std::min(vocab, i + 1024), j = i;
        Floats highest = all(-INFINITY), product{};
        for (; j + kLanes <= end; j += kLanes) {
            Floats v = load<Floats>(x + j);
            highest = larger(highest, v);
            product += v * 0.0f;  // 0, or NaN where an entry is not finite
        }
        float top = largest(highest), rest = sum(product);
        for (; j < end; ++j) {
            top = std::fmax(top, x[j]);
            rest += x[j] * 0.0f;
        }
        is_finite &= rest == 0.0f;
        if (top > peak)
            for (j = i; j < end; ++j)
                if (x[j] == top) {
                    peak = top;
                    at = int32_t(j);
                    break;
                }
    }
    // Sums of a few hundred terms in lanes, and of those in double precision.
    double total = 0;
    int64_t i = 0;
    while (i + kLanes <= vocab) {
        Floats part{};
        for (int64_t end = std::min(vocab, i + 64 * kLanes); i + kLanes <= end; i += kLanes)
            part += exponential(load<Floats>(x + i) - peak);
        total += sum(part);
    }
    for (; i < vocab; ++i) total += std::exp(x[i] - peak);
    *best = at;
    *log_sum = is_finite ? float(peak + std::log(total)) : NAN;
    *best_logprob = is_finite ? float(-std::log(total)) : NAN;
}

}  // namespace kajiya
