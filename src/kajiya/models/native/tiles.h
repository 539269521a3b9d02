// Small products whose operands lie in a core's cache: C[m][n] (+)= Σ_p A[m][p] · B[p][n].
//
// Operands are 32-bit words: one float, or two bf16 that the processor multiplies and adds at once (`Pairs`). A word of A is
// broadcast to all lanes, a row of B is read lane by lane; how far apart words of A lie is free, so A may be read transposed.
#pragma once
#include <algorithm>

#include "vectors.h"

namespace kajiya {

// A word is one float.
struct Singles {
    static constexpr int kPer = 1;
    typedef float Element;
    static Floats step(Floats acc, Words b, uint32_t a) {
        float value;
        std::memcpy(&value, &a, 4);
        return acc + as_floats(b) * value;
    }
};

// A word is two bf16, the first in its low half.
struct Pairs {
    static constexpr int kPer = 2;
    typedef uint16_t Element;
    static Floats step(Floats acc, Words b, uint32_t a) { return dot2(acc, b, a); }
};

// Sixteen floats to bf16, nearest, ties to even.
inline Halves halved(Floats value) {
#ifdef __AVX512BF16__
    return (Halves)_mm512_cvtneps_pbh((__m512)value);
#else
    Words bits = (Words)value;
    Words rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    auto is_nan = value != value;
    rounded = is_nan ? (bits >> 16 | 0x40u) : rounded;
    return __builtin_convertvector(rounded, Halves);
#endif
}

inline Floats load_element(const uint16_t* from) { return from_bf16(from); }
inline Floats load_element(const float* from) { return load<Floats>(from); }
inline void store_element(uint16_t* to, Floats value) { store(to, halved(value)); }
inline void store_element(float* to, Floats value) { store(to, value); }

// What `store_element` and `load_element` of E give back.
template <class E>
inline Floats rounded(Floats value) {
    return sizeof(E) == 2 ? from_bf16(halved(value)) : value;
}

inline Floats square_root(Floats value) {
#ifdef __AVX512F__
    return (Floats)_mm512_sqrt_ps((__m512)value);
#else
    for (int i = 0; i < kLanes; ++i) value[i] = std::sqrt(value[i]);
    return value;
#endif
}

inline float one(const uint16_t* from) { return bf16_value(*from); }
inline float one(const float* from) { return *from; }
inline void store_one(uint16_t* to, float value) { *to = to_bf16(value); }
inline void store_one(float* to, float value) { *to = value; }

inline void copy_lanes(const uint16_t* from, uint16_t* to) { store(to, load<Halves>(from)); }
inline void copy_lanes(const float* from, float* to) { store(to, load<Floats>(from)); }

// Sixteen words of the tokens that begin at `first` and `second`: pairs of bf16, or the first one's floats.
inline Words beside(const uint16_t* first, const uint16_t* second) {
    return widened(load<Halves>(first)) | widened(load<Halves>(second)) << 16;
}
inline Words beside(const float* first, const float*) { return load<Words>(first); }

// Sixteen rows of sixteen words, `row` apart, become columns: `to` gets sixteen rows, `step` apart.
inline void transpose(const uint32_t* from, int64_t row, uint32_t* to, int64_t step) {
#ifdef __AVX512F__
    __m512i a[kLanes], b[kLanes];
    for (int i = 0; i < kLanes; ++i) a[i] = _mm512_loadu_si512(from + i * row);
    for (int i = 0; i < kLanes; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < kLanes; i += 4)
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int i = 0; i < kLanes; i += 8)
        for (int j = 0; j < 4; ++j) {
            b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
            b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; ++j) {
        _mm512_storeu_si512(to + j * step, _mm512_shuffle_i32x4(b[j], b[j + 8], 0x88));
        _mm512_storeu_si512(to + (j + 8) * step, _mm512_shuffle_i32x4(b[j], b[j + 8], 0xdd));
    }
#else
    for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < kLanes; ++j) to[j * step + i] = from[i * row + j];
#endif
}

// Sixteen words whose low half is `first` and whose high half is `second`, both rounded to bf16.
inline Words paired(Floats first, Floats second) {
    return widened(halved(first)) | widened(halved(second)) << 16;
}

struct Left {
    const uint32_t* words;
    int64_t row, step;  // words from one m to the next, from one p to the next
};

struct Right {
    const uint32_t* words;
    int64_t step;  // words from one p to the next
};

template <class Kind, int M, int V, bool kAdd>
inline void tile(Left a, Right b, float* c, int64_t row, int64_t n_steps) {
    Floats acc[M][V];
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v) acc[m][v] = kAdd ? load<Floats>(c + m * row + v * kLanes) : Floats{};
    for (int64_t p = 0; p < n_steps; ++p) {
        Words right[V];
        for (int v = 0; v < V; ++v) right[v] = load<Words>(b.words + p * b.step + v * kLanes);
        for (int m = 0; m < M; ++m) {
            uint32_t left = a.words[m * a.row + p * a.step];
            for (int v = 0; v < V; ++v) acc[m][v] = Kind::step(acc[m][v], right[v], left);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v) store(c + m * row + v * kLanes, acc[m][v]);
}

// C is [m][n]; m is a multiple of 8, n of 16.
template <class Kind, bool kAdd>
inline void product(int64_t m, int64_t n, int64_t n_steps, Left a, Right b, float* c, int64_t row) {
    constexpr int kRows = 8;
    for (int64_t j = 0; j < n; j += 2 * kLanes) {
        bool is_wide = n - j >= 2 * kLanes;
        Right right{b.words + j, b.step};
        for (int64_t i = 0; i < m; i += kRows) {
            Left left{a.words + i * a.row, a.row, a.step};
            if (is_wide)
                tile<Kind, kRows, 2, kAdd>(left, right, c + i * row + j, row, n_steps);
            else
                tile<Kind, kRows, 1, kAdd>(left, right, c + i * row + j, row, n_steps);
        }
    }
}

}  // namespace kajiya
