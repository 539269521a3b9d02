// Attention over a paged cache: blocks of 16 positions, read where they lie.
//
// A block of one layer: keys [head][width][16], so that one vector holds a coordinate of all positions and scores need no
// sum across lanes; values [head][16][width]. Width is the head's, padded to 16. In 8 bits, each position of each head has a scale.
#pragma once
#include "vectors.h"

namespace kajiya {

constexpr int kBlock = 16;

enum CacheKind : int32_t { kCacheFloat32 = 0, kCacheBFloat16 = 1, kCacheInt8 = 2 };

inline int64_t cell_bytes(int32_t kind) { return kind == kCacheFloat32 ? 4 : kind == kCacheBFloat16 ? 2 : 1; }

struct LayerCache {
    uint8_t *keys, *values;
    float *key_scales, *value_scales;  // [block][head][16], 8 bits only
};

template <int Kind>
inline Floats read_cells(const uint8_t* from, int64_t index) {
    if constexpr (Kind == kCacheFloat32) return load<Floats>(from + 4 * index);
    if constexpr (Kind == kCacheBFloat16) return from_bf16((const uint16_t*)from + index);
    return __builtin_convertvector(load<Bytes>(from + index), Floats);
}

inline void write_cell(int32_t kind, uint8_t* to, int64_t index, float value) {
    if (kind == kCacheFloat32)
        ((float*)to)[index] = value;
    else if (kind == kCacheBFloat16)
        ((uint16_t*)to)[index] = to_bf16(value);
    else
        ((int8_t*)to)[index] = int8_t(std::nearbyint(value));
}

struct Heads {
    int32_t n_query, n_key, width, padded;  // of a head
    int32_t cache_kind;
};

// Puts a head's key and value of one position into its block.
inline void remember(const Heads& heads, LayerCache& cache, int64_t block, int head, int slot, const float* key,
                     const float* value) {
    int64_t place = block * heads.n_key + head, start = place * heads.padded * kBlock;
    float key_scale = 1, value_scale = 1;
    if (heads.cache_kind == kCacheInt8) {
        float key_peak = 0, value_peak = 0;
        for (int i = 0; i < heads.width; ++i) {
            key_peak = std::fmax(key_peak, std::fabs(key[i]));
            value_peak = std::fmax(value_peak, std::fabs(value[i]));
        }
        cache.key_scales[place * kBlock + slot] = key_peak / 127.0f;
        cache.value_scales[place * kBlock + slot] = value_peak / 127.0f;
        key_scale = key_peak > 0 ? 127.0f / key_peak : 0.0f;
        value_scale = value_peak > 0 ? 127.0f / value_peak : 0.0f;
    }
    for (int i = 0; i < heads.width; ++i) {
        write_cell(heads.cache_kind, cache.keys, start + i * kBlock + slot, key[i] * key_scale);
        write_cell(heads.cache_kind, cache.values, start + slot * heads.padded + i, value[i] * value_scale);
    }
}

// Scores of Q queries (scaled, [padded] each) against the 16 positions of one block.
template <int Kind, int Q>
inline void block_scores(const float* const* queries, int64_t padded, const uint8_t* keys, int64_t start,
                         const float* scales, float* const* scores) {
    Floats acc[Q][4] = {};
    for (int64_t i = 0; i < padded; i += 4) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            Floats key = read_cells<Kind>(keys, start + (i + j) * kBlock);
#pragma GCC unroll 4
            for (int q = 0; q < Q; ++q) acc[q][j] += all(queries[q][i + j]) * key;
        }
    }
    for (int q = 0; q < Q; ++q) {
        Floats total = (acc[q][0] + acc[q][1]) + (acc[q][2] + acc[q][3]);
        if (Kind == kCacheInt8) total *= load<Floats>(scales);
        store(scores[q], total);
    }
}

// Turns the first n scores into probabilities, times nothing; returns 1 / their sum. The scores are padded to whole vectors.
inline float soften(float* scores, int64_t n) {
    int64_t end = (n + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = n; i < end; ++i) scores[i] = -INFINITY;
    Floats best = load<Floats>(scores);
    for (int64_t i = kLanes; i < end; i += kLanes) best = larger(best, load<Floats>(scores + i));
    float peak = largest(best);
    Floats total{};
    for (int64_t i = 0; i < end; i += kLanes) {
        Floats p = exponential(load<Floats>(scores + i) - peak);
        store(scores + i, p);
        total += p;
    }
    return 1.0f / sum(total);
}

// Σ p[i] value[i] of one query over its n positions, 64 coordinates at a time.
template <int Kind>
inline void weigh(const float* p, int64_t n, float inverse, const Heads& heads, const LayerCache& cache, int head,
                  const int32_t* table, float* to) {
    for (int first = 0; first < heads.padded; first += 4 * kLanes) {
        int parts = std::min(4, (heads.padded - first) / kLanes);
        Floats acc[4] = {};
        for (int64_t i = 0; i < n; ++i) {
            int64_t place = int64_t(table[i / kBlock]) * heads.n_key + head, slot = i % kBlock;
            int64_t at = (place * kBlock + slot) * heads.padded + first;
            float weight = p[i];
            if (Kind == kCacheInt8) weight *= cache.value_scales[place * kBlock + slot];
            Floats w = all(weight);
            if (parts == 4) {
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) acc[j] += w * read_cells<Kind>(cache.values, at + j * kLanes);
            } else {
                for (int j = 0; j < parts; ++j) acc[j] += w * read_cells<Kind>(cache.values, at + j * kLanes);
            }
        }
        for (int j = 0; j < parts; ++j) {
            float lanes[kLanes];
            store(lanes, acc[j] * inverse);
            int from = first + j * kLanes;
            std::memcpy(to + from, lanes, 4 * std::max(0, std::min(kLanes, heads.width - from)));
        }
    }
}

// Up to four queries of one key head of one sequence: query q sees positions 0 … lengths[q] − 1.
template <int Kind>
inline void attend(const float* const* queries, const int64_t* lengths, int n, const Heads& heads,
                   const LayerCache& cache, int head, const int32_t* table, float* scratch, int64_t stride, float* const* to) {
    int64_t longest = 0;
    for (int q = 0; q < n; ++q) longest = std::max(longest, lengths[q]);
    for (int64_t first = 0; first < longest; first += kBlock) {
        int64_t place = int64_t(table[first / kBlock]) * heads.n_key + head;
        int64_t start = place * heads.padded * kBlock;
        const float* scales = cache.key_scales ? cache.key_scales + place * kBlock : nullptr;
        float* scores[4];
        for (int q = 0; q < n; ++q) scores[q] = scratch + q * stride + first;
        switch (n) {
            case 1: block_scores<Kind, 1>(queries, heads.padded, cache.keys, start, scales, scores); break;
            case 2: block_scores<Kind, 2>(queries, heads.padded, cache.keys, start, scales, scores); break;
            case 3: block_scores<Kind, 3>(queries, heads.padded, cache.keys, start, scales, scores); break;
            default: block_scores<Kind, 4>(queries, heads.padded, cache.keys, start, scales, scores);
        }
    }
    for (int q = 0; q < n; ++q) {
        float inverse = soften(scratch + q * stride, lengths[q]);
        weigh<Kind>(scratch + q * stride, lengths[q], inverse, heads, cache, head, table, to[q]);
    }
}

}  // namespace kajiya
