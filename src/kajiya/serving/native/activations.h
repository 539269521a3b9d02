// Activations of a step's tokens, in memory that is kept for the next step.
#pragma once
#include <cstdlib>
#include <new>
#include <vector>

#include "linear.h"

namespace kajiya {

// Memory that a thread's calls take in turn and leave to its next call: fresh pages cost more than what is written to them.
struct Kept {
    struct Block {
        float* at = nullptr;
        int64_t bytes = 0;
    };
    std::vector<Block> blocks;
    size_t n_taken = 0;
    ~Kept() {
        for (Block& block : blocks) std::free(block.at);
    }
    // Throws std::bad_alloc where there is no more.
    float* take(int64_t bytes) {
        if (n_taken == blocks.size()) blocks.emplace_back();
        Block& block = blocks[n_taken++];
        if (block.bytes < bytes) {
            std::free(block.at);
            block = {};
            block.at = (float*)std::aligned_alloc(64, bytes);
            if (!block.at) throw std::bad_alloc();
            block.bytes = bytes;
        }
        return block.at;
    }
};
inline thread_local Kept kept;

struct Buffer {
    float* at;
    explicit Buffer(int64_t n) : at(kept.take((n * 4 + 127) / 64 * 64)) {}
};

// Gives back what was taken when a call ends.
struct Taking {
    ~Taking() { kept.n_taken = 0; }
};

// Activations of all tokens, with what products of weights of a kind read instead: bf16, or integers.
struct Activations {
    int64_t stride, groups, width;  // width: bytes of a token
    int32_t kind;
    Buffer values, scales, zeros, bytes;
    Activations(int64_t n_tokens, int64_t n, int32_t kind)
        : stride(n), groups(n_groups(n)),
          width(kind == kFloat32 ? 0 : kind == kBFloat16 ? n_pairs(n) * 4 : groups * kGroup), kind(kind),
          values(n_tokens * n), scales(kind >= kInt8 ? n_tokens * groups : 1), zeros(kind >= kInt8 ? n_tokens * groups : 1),
          bytes(n_tokens * width / 4) {}
    float* row(int64_t t) { return values.at + t * stride; }
    void seal(int64_t t) { seal(t, 0, stride); }
    // Columns first … first + n − 1 of a token, from the beginning of a group to the end of one or of the row.
    void seal(int64_t t, int64_t first, int64_t n) { seal(t, first, n, row(t) + first); }
    // The same of values that lie elsewhere.
    void seal(int64_t t, int64_t first, int64_t n, const float* from) {
        int8_t* to = (int8_t*)bytes.at + t * width;
        if (kind == kBFloat16) {
            if (first + n == stride && stride % 2) ((uint16_t*)to)[stride] = 0;
            to_bf16_row(from, n, (uint16_t*)to + first);
        } else if (kind >= kInt8) {
            for (int64_t i = 0, place = t * groups + first / kGroup; i < n; i += kGroup, ++place) {
                float padded[kGroup] = {};
                if (n - i < kGroup) std::memcpy(padded, from + i, 4 * (n - i));
                quantize_values(n - i < kGroup ? padded : from + i, zero_of(kind), to + first + i, scales.at + place,
                                (int32_t*)zeros.at + place);
            }
        } else if (from != row(t) + first) {
            std::memcpy(row(t) + first, from, 4 * n);
        }
    }
    Rows rows() const {
        return {values.at, stride, (const int8_t*)bytes.at, scales.at, (const int32_t*)zeros.at};
    }
};

}  // namespace kajiya
