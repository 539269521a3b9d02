// Low-rank parts of adapters: y += B (A x), for the tokens of many adapters in one step.
//
// A few tokens of one adapter are computed together, so that its matrices are read once for them. Each of them is summed in
// the same order however many there are: its result is the same, to the bit, in any company.
#pragma once
#include <algorithm>
#include <functional>
#include <vector>

#include "vectors.h"

namespace kajiya {

// One part of an adapter: y[offset …] += B (A x). A [rank][n_in] and B transposed [rank][n_out], its scale multiplied in, lie as
// they are read: for every four ranks A's and then B's, sixteen numbers of each at a time, filled up with zeros: [n / 16][4][16].
struct Patch {
    int32_t layer, target, rank, n_in, offset, n_out;  // target: 0 qkv, 1 out, 2 gate_up, 3 down
    const void* rows;
};

// Parts in the order of layers, targets and offsets, one behind the other in memory, their numbers in bf16 or in fp32.
struct Adapter {
    int32_t n_patches, is_bf16;
    const Patch* patches;
};

constexpr int kPatched = 4;  // tokens that are computed together

// Tokens of one adapter.
struct Patched {
    const Adapter* adapter;
    int32_t count, tokens[kPatched];
};

inline Floats lanes(const float* from) { return load<Floats>(from); }
inline Floats lanes(const uint16_t* from) { return from_bf16(from); }

// The first `n` of sixteen lanes; the others are 0.
inline Floats first_lanes(const float* from, int64_t n) {
    float padded[kLanes] = {};
    std::memcpy(padded, from, n * 4);
    return load<Floats>(padded);
}

constexpr int kRanks = 4;  // ranks that lie together

// Sixteen numbers of each of four ranks; what lies a little further is fetched.
template <class Number>
inline void read(const Number*& at, Floats (&w)[kRanks]) {
    for (int64_t line = 0; line < int64_t(kRanks * kLanes * sizeof(Number)); line += 64)
        __builtin_prefetch((const char*)at + 2048 + line);
#pragma GCC unroll 4
    for (int r = 0; r < kRanks; ++r, at += kLanes) w[r] = lanes(at);
}

template <class Number, int M>
inline void add_part(const Patch& part, const float* const* x, float* const* y) {
    const Number* at = (const Number*)part.rows;
    int64_t in = part.n_in / kLanes * kLanes, out = part.n_out / kLanes * kLanes;
    for (int rank = 0; rank < part.rank; rank += kRanks) {
        Floats w[kRanks], total[M][kRanks] = {};
        for (int64_t i = 0; i < in; i += kLanes) {
            read(at, w);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
                for (int r = 0; r < kRanks; ++r) total[m][r] += w[r] * load<Floats>(x[m] + i);
        }
        if (in < part.n_in) {
            read(at, w);
            for (int m = 0; m < M; ++m)
                for (int r = 0; r < kRanks; ++r) total[m][r] += w[r] * first_lanes(x[m] + in, part.n_in - in);
        }
        float z[M][kRanks];
        for (int m = 0; m < M; ++m)
            for (int r = 0; r < kRanks; ++r) z[m][r] = sum(total[m][r]);
        for (int64_t i = 0; i < out; i += kLanes) {
            read(at, w);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
                Floats v = load<Floats>(y[m] + i);
#pragma GCC unroll 4
                for (int r = 0; r < kRanks; ++r) v += w[r] * z[m][r];
                store(y[m] + i, v);
            }
        }
        if (out < part.n_out) {
            read(at, w);
            for (int m = 0; m < M; ++m) {
                Floats v = first_lanes(y[m] + out, part.n_out - out);
                for (int r = 0; r < kRanks; ++r) v += w[r] * z[m][r];
                std::memcpy(y[m] + out, &v, (part.n_out - out) * 4);
            }
        }
    }
}

using AddPart = void (*)(const Patch&, const float* const*, float* const*);
constexpr AddPart kAddPart[2][kPatched + 1] = {
    {nullptr, add_part<float, 1>, add_part<float, 2>, add_part<float, 3>, add_part<float, 4>},
    {nullptr, add_part<uint16_t, 1>, add_part<uint16_t, 2>, add_part<uint16_t, 3>, add_part<uint16_t, 4>}};

// Adds what an adapter has of a layer's target to rows of y for rows of x.
inline void add_parts(const Adapter& adapter, int layer, int target, int count, const float* const* x, float* const* y) {
    const Patch* end = adapter.patches + adapter.n_patches;
    const Patch* part = std::partition_point(adapter.patches, end, [&](const Patch& one) {
        return one.layer < layer || (one.layer == layer && one.target < target);
    });
    for (; part < end && part->layer == layer && part->target == target; ++part) {
        float* to[kPatched];
        for (int i = 0; i < count; ++i) to[i] = y[i] + part->offset;
        kAddPart[adapter.is_bf16][count](*part, x, to);
    }
}

// The tokens that have adapters, those of an adapter together, a few at a time.
inline std::vector<Patched> group_by_adapter(const std::vector<const Adapter*>& of_token) {
    std::vector<int32_t> order;
    for (size_t t = 0; t < of_token.size(); ++t)
        if (of_token[t]) order.push_back(int32_t(t));
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return std::less<>{}(of_token[a], of_token[b]); });
    std::vector<Patched> groups;
    for (int32_t t : order) {
        if (groups.empty() || groups.back().adapter != of_token[t] || groups.back().count == kPatched)
            groups.push_back({of_token[t], 0, {}});
        groups.back().tokens[groups.back().count++] = t;
    }
    return groups;
}

}  // namespace kajiya
