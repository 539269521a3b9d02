// Products with packed weights: y[t] = W x[t] + b for a handful of tokens or hundreds.
//
// Weights lie in panels of 32 outputs, in the order in which they are read, so that memory streams. Every output is
// summed over k in the same order however many tokens there are: the result of a token is the same, to the bit, in any company.
#pragma once
#include <algorithm>

#include "vectors.h"

namespace kajiya {

constexpr int kPanel = 32;
constexpr int kGroup = 32;  // inputs that share a scale in 8 and 4 bits
static_assert(kPanel % kGroup == 0, "a panel's outputs fill whole groups of the next product's inputs");

enum Kind : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kInt4 = 3 };

struct Linear {
    int32_t kind, n_out, n_in, padding;
    const void* weights;
    const uint16_t* scales;  // bf16 [panel][group][32], for 8 and 4 bits
    const float* bias;       // [n_out] or null
};

// Activations of a few tokens, as the product wants them.
struct Rows {
    const float* values;  // [token][stride]
    int64_t stride;
    const int8_t* bytes;  // [token][padded n_in]: bf16 for weights in bf16, integers for those in 8 and 4 bits
    const float* scales;  // [token][groups], 8 and 4 bits only
    const int32_t* zeros;  // [token][groups]: what the weights' zero adds to a group, taken off
};

inline int64_t n_panels(const Linear& w) { return (w.n_out + kPanel - 1) / kPanel; }
inline int64_t n_groups(int64_t n_in) { return (n_in + kGroup - 1) / kGroup; }

inline int64_t n_pairs(int64_t n_in) { return (n_in + 1) / 2; }

inline int64_t packed_bytes(int32_t kind, int64_t n_out, int64_t n_in) {
    int64_t outputs = (n_out + kPanel - 1) / kPanel * kPanel, padded = n_groups(n_in) * kGroup;
    switch (kind) {
        case kFloat32: return outputs * n_in * 4;
        case kBFloat16: return outputs * n_pairs(n_in) * 4;
        case kInt8: return outputs * padded;
        default: return outputs * padded / 2;
    }
}

// The unsigned integer that stands for a weight of 0.
inline int zero_of(int32_t kind) { return kind == kInt8 ? 128 : 8; }

// One group of one output: the scale that is stored, and the integers [0, 2·zero).
inline uint16_t quantize_group(const float* w, int64_t n, int zero, uint8_t* to) {
    float peak = 0;
    for (int64_t i = 0; i < n; ++i)
        if (std::fabs(w[i]) > std::fabs(peak)) peak = w[i];
    // The value that is largest in size becomes −zero exactly, as in llama.cpp's Q4_0; in 8 bits ±127 does as well.
    uint16_t scale = to_bf16(zero == 8 ? peak / -8.0f : peak / 127.0f);
    float value = bf16_value(scale);
    for (int64_t i = 0; i < kGroup; ++i) {
        // The integers are of the rounded scale, so that rounding it costs nothing.
        float q = i < n && value != 0 ? std::nearbyint(w[i] / value) : 0.0f;
        to[i] = uint8_t(std::min(float(zero - 1), std::max(float(-zero), q)) + zero);
    }
    return scale;
}

inline void pack_panel(const float* w, Linear& to, int64_t panel, uint8_t* data, uint16_t* scales) {
    int64_t n_in = to.n_in, groups = n_groups(n_in), per_panel = packed_bytes(to.kind, kPanel, n_in);
    uint8_t* out = data + panel * per_panel;
    std::memset(out, 0, per_panel);
    for (int lane = 0; lane < kPanel; ++lane) {
        int64_t row = panel * kPanel + lane;
        if (row >= to.n_out) {
            // Rows of nothing: integers at their zero.
            if (to.kind >= kInt8)
                for (int64_t g = 0; g < groups; ++g) scales[(panel * groups + g) * kPanel + lane] = 0;
            continue;
        }
        const float* from = w + row * n_in;
        if (to.kind == kFloat32) {
            for (int64_t k = 0; k < n_in; ++k) ((float*)out)[k * kPanel + lane] = from[k];
        } else if (to.kind == kBFloat16) {
            // Two inputs of an output share a word, as the processor multiplies them.
            for (int64_t k = 0; k < n_in; ++k) ((uint16_t*)out)[(k / 2 * kPanel + lane) * 2 + k % 2] = to_bf16(from[k]);
        } else {
            int zero = zero_of(to.kind);
            for (int64_t g = 0; g < groups; ++g) {
                uint8_t q[kGroup];
                int64_t n = std::min<int64_t>(kGroup, n_in - g * kGroup);
                scales[(panel * groups + g) * kPanel + lane] = quantize_group(from + g * kGroup, n, zero, q);
                for (int i = 0; i < kGroup; ++i) {
                    int64_t k = g * kGroup + i;
                    if (to.kind == kInt8)
                        out[k / 4 * 128 + lane * 4 + k % 4] = q[i];
                    else  // k … k+3 in the low halves, k+4 … k+7 in the high ones
                        out[k / 8 * 128 + lane * 4 + k % 4] |= uint8_t(q[i] << (k % 8 < 4 ? 0 : 4));
                }
            }
        }
    }
}

template <int M>
inline void put(float* to, int64_t stride, const Floats (&acc)[M][2], const Linear& w, int64_t panel) {
    int64_t first = panel * kPanel, n = std::min<int64_t>(kPanel, w.n_out - first);
    for (int m = 0; m < M; ++m, to += stride) {
        if (n == kPanel && !w.bias) {
            store(to, acc[m][0]);
            store(to + kLanes, acc[m][1]);
            continue;
        }
        float lanes[kPanel];
        store(lanes, acc[m][0]);
        store(lanes + kLanes, acc[m][1]);
        for (int64_t i = 0; i < n; ++i) to[i] = w.bias ? lanes[i] + w.bias[first + i] : lanes[i];
    }
}

// Where a panel is read for the last time of several, the one behind it (`next`, or null) is fetched: memory is never idle.
inline void fetch(const uint8_t* next) {
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + 64, 0, 2);
}

template <int M>
inline void floats_panel(const Rows& x, int64_t t, const Linear& w, int64_t panel, const uint8_t* next, float* to,
                         int64_t stride) {
    const float* row = x.values + t * x.stride;
    const float* at = (const float*)w.weights + panel * kPanel * w.n_in;
    Floats acc[M][2] = {};
    for (int64_t k = 0; k < w.n_in; ++k, at += kPanel) {
        Floats a = load<Floats>(at), b = load<Floats>(at + kLanes);
        if (next) fetch(next + k * 128);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            Floats v = all(row[m * x.stride + k]);
            acc[m][0] += v * a;
            acc[m][1] += v * b;
        }
    }
    put<M>(to, stride, acc, w, panel);
}

template <int M>
inline void pairs_panel(const Rows& x, int64_t t, const Linear& w, int64_t panel, const uint8_t* next, float* to,
                        int64_t stride) {
    int64_t pairs = n_pairs(w.n_in);
    const uint32_t* row = (const uint32_t*)x.bytes + t * pairs;
    const uint32_t* at = (const uint32_t*)w.weights + panel * kPanel * pairs;
    Floats acc[M][2] = {};
    for (int64_t k = 0; k < pairs; ++k, at += kPanel) {
        Words a = load<Words>(at), b = load<Words>(at + kLanes);
        if (next) fetch(next + k * 128);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            uint32_t v = row[m * pairs + k];
            acc[m][0] = dot2(acc[m][0], a, v);
            acc[m][1] = dot2(acc[m][1], b, v);
        }
    }
    put<M>(to, stride, acc, w, panel);
}

template <int M, bool Is4>
inline void integers_panel(const Rows& x, int64_t t, const Linear& w, int64_t panel, const uint8_t* next, float* to,
                           int64_t stride) {
    int64_t groups = n_groups(w.n_in), width = groups * kGroup;
    const uint8_t* at = (const uint8_t*)w.weights + panel * kPanel * width / (Is4 ? 2 : 1);
    const uint8_t* first = at;
    const uint16_t* scales = w.scales + panel * groups * kPanel;
    const int8_t* bytes = x.bytes + t * width;
    Floats acc[M][2] = {};
    for (int64_t g = 0; g < groups; ++g, scales += kPanel) {
        Ints part[M][2];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
            part[m][0] = part[m][1] = Ints{} + x.zeros[(t + m) * groups + g];
        const int8_t* values = bytes + g * kGroup;
#pragma GCC unroll 8
        for (int k = 0; k < kGroup; k += Is4 ? 8 : 4, at += 128) {
            Words a = load<Words>(at), b = load<Words>(at + 64);
            if (next) fetch(next + (at - first));
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                int32_t v = load<int32_t>(values + m * width + k);
                if (Is4) {
                    int32_t u = load<int32_t>(values + m * width + k + 4);
                    part[m][0] = dot4(dot4(part[m][0], a & 0x0f0f0f0fu, v), a >> 4 & 0x0f0f0f0fu, u);
                    part[m][1] = dot4(dot4(part[m][1], b & 0x0f0f0f0fu, v), b >> 4 & 0x0f0f0f0fu, u);
                } else {
                    part[m][0] = dot4(part[m][0], a, v);
                    part[m][1] = dot4(part[m][1], b, v);
                }
            }
        }
        Floats a = from_bf16(scales), b = from_bf16(scales + kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            float scale = x.scales[(t + m) * groups + g];
            acc[m][0] += __builtin_convertvector(part[m][0], Floats) * (a * scale);
            acc[m][1] += __builtin_convertvector(part[m][1], Floats) * (b * scale);
        }
    }
    put<M>(to, stride, acc, w, panel);
}

template <int M>
inline void some_tokens(const Rows& x, int64_t t, const Linear& w, int64_t panel, const uint8_t* next, float* to,
                        int64_t stride) {
    if (w.kind == kFloat32)
        floats_panel<M>(x, t, w, panel, next, to, stride);
    else if (w.kind == kBFloat16)
        pairs_panel<M>(x, t, w, panel, next, to, stride);
    else if constexpr (M <= 6) {
        if (w.kind == kInt8)
            integers_panel<M, false>(x, t, w, panel, next, to, stride);
        else
            integers_panel<M, true>(x, t, w, panel, next, to, stride);
    }
}

using Tile = void (*)(const Rows&, int64_t, const Linear&, int64_t, const uint8_t*, float*, int64_t);
constexpr Tile kTiles[] = {nullptr,          some_tokens<1>, some_tokens<2>,  some_tokens<3>,  some_tokens<4>,
                           some_tokens<5>,   some_tokens<6>, some_tokens<7>,  some_tokens<8>,  some_tokens<9>,
                           some_tokens<10>, some_tokens<11>, some_tokens<12>};

// One panel of the product for tokens t … t + n − 1, to [token][stride]; `next`: the panel that is read behind this one, or null.
inline void panel_product(const Rows& x, int64_t t, int64_t n, const Linear& w, int64_t panel, const uint8_t* next, float* to,
                          int64_t stride) {
    int64_t most = w.kind <= kBFloat16 ? 12 : 6;
    // Tiles of like size: 16 tokens are 8 + 8 and not 12 + 4, which would leave the second one waiting for loads.
    int64_t tiles = (n + most - 1) / most, end = t + n;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        int64_t count = (end - t + tiles - tile - 1) / (tiles - tile);
        kTiles[count](x, t, w, panel, tile && tile + 1 == tiles ? next : nullptr, to, stride);
        t += count;
        to += count * stride;
    }
}

inline const uint8_t* panel_at(const Linear& w, int64_t panel) {
    if (panel >= n_panels(w)) return nullptr;
    return (const uint8_t*)w.weights + panel * packed_bytes(w.kind, kPanel, w.n_in);
}

// Tokens that a panel is read for at a time: of hundreds of tokens those that stay near while panels pass by.
constexpr int64_t kTogether = 48;

// Panels `first` … `end` − 1 of the product for `n` tokens; y is [token][stride].
inline void product(const Rows& x, int64_t n, const Linear& w, int64_t first, int64_t end, float* y, int64_t stride) {
    for (int64_t t = 0; t < n; t += kTogether)
        for (int64_t panel = first; panel < end; ++panel)
            panel_product(x, t, std::min(kTogether, n - t), w, panel, n <= kTogether ? panel_at(w, panel + 1) : nullptr,
                          y + t * stride + panel * kPanel, stride);
}

// Quantizes a group of a token's activations, for weights whose zero is `zero`.
inline void quantize_values(const float* x, int zero, int8_t* bytes, float* scale, int32_t* zeros) {
    Floats a = load<Floats>(x), b = load<Floats>(x + kLanes);
    float peak = peak_of(x, kGroup);
    float inverse = peak > 0 ? 127.0f / peak : 0.0f;
    // Adding and subtracting 1.5 · 2^23 rounds to the nearest integer.
    Ints p = __builtin_convertvector((a * inverse + 12582912.0f) - 12582912.0f, Ints);
    Ints q = __builtin_convertvector((b * inverse + 12582912.0f) - 12582912.0f, Ints);
    store(bytes, __builtin_convertvector(p, Bytes));
    store(bytes + kLanes, __builtin_convertvector(q, Bytes));
    *zeros = -zero * sum(p + q);
    // Not finite in, not finite out: the engine must see it.
    *scale = std::isfinite(peak) ? peak / 127.0f : NAN;
}

}  // namespace kajiya
