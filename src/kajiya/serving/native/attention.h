// Attention over a paged cache: blocks of 16 positions, read where they lie.
//
// A block of one layer: keys [head][width][16], so that one vector holds a coordinate of all positions and scores need no
// sum across lanes; values [head][16][width]. Width is the head's, padded to 16. In bf16, two coordinates of a key share a
// word, and two positions' values. In 8 bits, each position of each head has a scale.
#pragma once
#include <algorithm>

#include "pointwise.h"
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

struct Heads {
    int32_t n_query, n_key, width, padded;  // of a head
    int32_t cache_kind;
    float cap;  // of scores; 0: none
};

// A key and a value in bf16 into their block: pairs of a key's coordinates side by side, and pairs of values' positions.
inline void remember_halves(const Heads& heads, int slot, const float* key, const float* value, uint8_t* keys, uint8_t* values) {
    uint16_t* to = (uint16_t*)values + slot / 2 * heads.padded * 2 + slot % 2;
    for (int first = 0; first < heads.width; first += kLanes) {
        int count = std::min(kLanes, heads.width - first);
        uint16_t halves[kLanes] = {};
        to_bf16_row(key + first, count, halves);
        for (int i = 0; i < count; i += 2) std::memcpy(keys + ((first + i) / 2 * kBlock + slot) * 4, halves + i, 4);
        to_bf16_row(value + first, count, halves);
        for (int i = 0; i < count; ++i) to[(first + i) * 2] = halves[i];
    }
}

// Puts a head's key and value of one position into its block.
inline void remember(const Heads& heads, LayerCache& cache, int64_t block, int head, int slot, const float* key,
                     const float* value) {
    int64_t place = block * heads.n_key + head, start = place * heads.padded * kBlock;
    float key_scale = 1, value_scale = 1;
    if (heads.cache_kind == kCacheInt8) {
        float key_peak = peak_of(key, heads.width), value_peak = peak_of(value, heads.width);
        // Not finite in, not finite out: the engine must see it.
        cache.key_scales[place * kBlock + slot] = std::isfinite(key_peak) ? key_peak / 127.0f : NAN;
        cache.value_scales[place * kBlock + slot] = std::isfinite(value_peak) ? value_peak / 127.0f : NAN;
        key_scale = key_peak > 0 ? 127.0f / key_peak : 0.0f;
        value_scale = value_peak > 0 ? 127.0f / value_peak : 0.0f;
    }
    uint8_t *keys = cache.keys + start * cell_bytes(heads.cache_kind), *values = cache.values + start * cell_bytes(heads.cache_kind);
    if (heads.cache_kind == kCacheBFloat16) {
        remember_halves(heads, slot, key, value, keys, values);
        return;
    }
    for (int i = 0; i < heads.width; ++i) {
        int64_t to_key = i * kBlock + slot, to_value = slot * heads.padded + i;
        if (heads.cache_kind == kCacheFloat32) {
            ((float*)keys)[to_key] = key[i];
            ((float*)values)[to_value] = value[i];
        } else {
            ((int8_t*)keys)[to_key] = int8_t(std::nearbyint(key[i] * key_scale));
            ((int8_t*)values)[to_value] = int8_t(std::nearbyint(value[i] * value_scale));
        }
    }
}

// Has a head's cells of a block on their way, for there is nothing in their addresses that the processor could foresee.
inline void fetch_cells(const uint8_t* cells, const int32_t* table, int64_t block, const Heads& heads, int head, int64_t bytes) {
    const uint8_t* from = cells + (int64_t(table[block]) * heads.n_key + head) * bytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

constexpr int64_t kAhead = 4;  // blocks that are on their way

// Whose keys are read next by this thread: they are on their way while the last values are weighed.
struct Coming {
    const int32_t* table;  // null: nothing comes
    int head;
    int64_t blocks;
};

// Scores of Q queries (scaled, [padded] each, in bf16 where the cache is) against the 16 positions of one block.
template <int Kind, int Q>
inline void block_scores(const float* const* queries, int64_t padded, const uint8_t* keys, const float* scales,
                         float* const* scores) {
    Floats acc[Q][4] = {};
    constexpr int kEach = Kind == kCacheBFloat16 ? 2 : 1;  // coordinates of a lane
    for (int64_t i = 0; i < padded / kEach; i += 4) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            if constexpr (Kind == kCacheBFloat16) {
                Words key = load<Words>(keys + (i + j) * kBlock * 4);
#pragma GCC unroll 4
                for (int q = 0; q < Q; ++q)
                    acc[q][j] = dot2(acc[q][j], key, load<uint32_t>((const uint8_t*)queries[q] + (i + j) * 4));
            } else {
                Floats key = read_cells<Kind>(keys, (i + j) * kBlock);
#pragma GCC unroll 4
                for (int q = 0; q < Q; ++q) acc[q][j] += all(queries[q][i + j]) * key;
            }
        }
    }
    for (int q = 0; q < Q; ++q) {
        Floats total = (acc[q][0] + acc[q][1]) + (acc[q][2] + acc[q][3]);
        if (Kind == kCacheInt8) total *= load<Floats>(scales);
        store(scores[q], total);
    }
}

// Turns the first n scores into probabilities times their sum, with zeros behind them up to `room`, which is in whole
// vectors; returns 1 / their sum.
inline float soften(float* scores, int64_t n, int64_t room) {
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
    for (int64_t i = end; i < room; i += kLanes) store(scores + i, Floats{});
    return 1.0f / sum(total);
}

// Σ p[i] value[i] of Q queries over n positions, P · 16 coordinates from `first` on.
template <int Kind, int Q, int P>
inline void weigh(const float* p, int64_t stride, int64_t n, const float* inverse, const Heads& heads,
                  const LayerCache& cache, int head, const int32_t* table, int first, const Coming& coming, float* const* to) {
    Floats acc[Q][P] = {};
    int64_t bytes = heads.padded * kBlock * cell_bytes(Kind), blocks = (n + kBlock - 1) / kBlock;
    for (int64_t start = 0; start < n; start += kBlock) {
        int64_t place = int64_t(table[start / kBlock]) * heads.n_key + head, count = std::min<int64_t>(kBlock, n - start);
        const uint8_t* values = cache.values + place * bytes;
        int64_t ahead = start / kBlock + kAhead;
        if (ahead < blocks)
            fetch_cells(cache.values, table, ahead, heads, head, bytes);
        else if (coming.table && ahead - std::max(blocks, kAhead) < coming.blocks)
            fetch_cells(cache.keys, coming.table, ahead - std::max(blocks, kAhead), heads, coming.head, bytes);
        if constexpr (Kind == kCacheBFloat16) {
            for (int64_t i = 0; i < count; i += 2) {
                // What lies behind the last position is none of this sequence's.
                uint32_t known = i + 1 < count ? 0xffffffffu : 0xffffu;
#pragma GCC unroll 4
                for (int j = 0; j < P; ++j) {
                    Words value = load<Words>(values + (i / 2 * heads.padded + first + j * kLanes) * 4) & known;
#pragma GCC unroll 4
                    for (int q = 0; q < Q; ++q) {
                        const uint8_t* weights = (const uint8_t*)(p + q * stride);
                        acc[q][j] = dot2(acc[q][j], value, load<uint32_t>(weights + (start + i) * 2));
                    }
                }
            }
        } else {
            for (int64_t i = 0; i < count; ++i) {
                float scale = Kind == kCacheInt8 ? cache.value_scales[place * kBlock + i] : 1.0f;
#pragma GCC unroll 4
                for (int j = 0; j < P; ++j) {
                    Floats value = read_cells<Kind>(values, i * heads.padded + first + j * kLanes);
#pragma GCC unroll 4
                    for (int q = 0; q < Q; ++q) acc[q][j] += all(p[q * stride + start + i] * scale) * value;
                }
            }
        }
    }
    for (int q = 0; q < Q; ++q)
        for (int j = 0; j < P; ++j) {
            float lanes[kLanes];
            store(lanes, acc[q][j] * inverse[q]);
            int from = first + j * kLanes;
            std::memcpy(to[q] + from, lanes, 4 * std::max(0, std::min(kLanes, heads.width - from)));
        }
}

// Q queries of one key head of one sequence: query q sees positions unseen[q] … lengths[q] − 1.
template <int Kind, int Q>
inline void attend_some(const float* const* queries, const int64_t* lengths, const int64_t* unseen, const Heads& heads,
                        const LayerCache& cache, int head, const int32_t* table, const Coming& coming, float* scratch,
                        int64_t stride, float* const* to) {
    int64_t longest = *std::max_element(lengths, lengths + Q), room = (longest + kBlock - 1) / kBlock * kBlock;
    int64_t bytes = heads.padded * kBlock * cell_bytes(Kind), blocks = room / kBlock;
    for (int64_t block = 0; block < std::min(blocks, kAhead); ++block)
        fetch_cells(cache.keys, table, block, heads, head, bytes);
    for (int64_t first = 0; first < longest; first += kBlock) {
        int64_t place = int64_t(table[first / kBlock]) * heads.n_key + head;
        const float* scales = Kind == kCacheInt8 ? cache.key_scales + place * kBlock : nullptr;
        int64_t ahead = first / kBlock + kAhead;
        if (ahead < blocks)
            fetch_cells(cache.keys, table, ahead, heads, head, bytes);
        else if (ahead - blocks < std::min(blocks, kAhead))
            fetch_cells(cache.values, table, ahead - blocks, heads, head, bytes);
        float* scores[Q];
        for (int q = 0; q < Q; ++q) scores[q] = scratch + q * stride + first;
        block_scores<Kind, Q>(queries, heads.padded, cache.keys + place * bytes, scales, scores);
    }
    float inverse[Q];
    for (int q = 0; q < Q; ++q) {
        float* row = scratch + q * stride;
        if (heads.cap > 0) cap_all(row, room, heads.cap);
        std::fill(row, row + unseen[q], -INFINITY);
        inverse[q] = soften(row, lengths[q], room);
        if (Kind == kCacheBFloat16) to_bf16_row(row, room, (uint16_t*)row);  // shorter, so it may lie where it was
    }
    int coordinate = 0;
    for (; coordinate + 4 * kLanes <= heads.padded; coordinate += 4 * kLanes)
        weigh<Kind, Q, 4>(scratch, stride, longest, inverse, heads, cache, head, table, coordinate, coming, to);
    for (; coordinate < heads.padded; coordinate += kLanes)
        weigh<Kind, Q, 1>(scratch, stride, longest, inverse, heads, cache, head, table, coordinate, coming, to);
}

// Up to four queries.
template <int Kind>
inline void attend(const float* const* queries, const int64_t* lengths, const int64_t* unseen, int n, const Heads& heads,
                   const LayerCache& cache, int head, const int32_t* table, const Coming& coming, float* scratch,
                   int64_t stride, float* const* to) {
    switch (n) {
        case 1: attend_some<Kind, 1>(queries, lengths, unseen, heads, cache, head, table, coming, scratch, stride, to); break;
        case 2: attend_some<Kind, 2>(queries, lengths, unseen, heads, cache, head, table, coming, scratch, stride, to); break;
        case 3: attend_some<Kind, 3>(queries, lengths, unseen, heads, cache, head, table, coming, scratch, stride, to); break;
        default: attend_some<Kind, 4>(queries, lengths, unseen, heads, cache, head, table, coming, scratch, stride, to);
    }
}

}  // namespace kajiya
