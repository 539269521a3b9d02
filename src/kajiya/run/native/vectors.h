// Sixteen lanes at a time, in the compiler's own vector types: AVX-512 where there is AVX-512, else what the machine has.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace kajiya {

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

template <class Vector>
inline Vector load(const void* from) {
    Vector value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class Vector>
inline void store(void* to, Vector value) {
    std::memcpy(to, &value, sizeof value);
}

inline Floats all(float value) { return Floats{} + value; }

inline Floats as_floats(Words bits) { return (Floats)bits; }

// Where the compiler's own form of an operation takes many instructions, the processor's one stands beside it; both give the same.
inline Words widened(Halves halves) {
#ifdef __AVX512F__
    return (Words)_mm512_cvtepu16_epi32((__m256i)halves);
#else
    return __builtin_convertvector(halves, Words);
#endif
}

// bf16 is the upper half of a float.
inline Floats from_bf16(Halves halves) { return as_floats(widened(halves) << 16); }
inline Floats from_bf16(const uint16_t* from) { return from_bf16(load<Halves>(from)); }

inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);  // stays a NaN
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);                 // nearest, ties to even
}

inline float bf16_value(uint16_t half) {
    uint32_t bits = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Each lane: acc + Σ over four bytes of weight (unsigned) × activation (signed).
inline Ints dot4(Ints acc, Words weights, int32_t activations) {
#ifdef __AVX512VNNI__
    return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weights, _mm512_set1_epi32(activations));
#else
    for (int byte = 0; byte < 4; ++byte) {
        Ints weight = (Ints)(weights >> (8 * byte) & 0xffu);
        acc += weight * int32_t(int8_t(activations >> (8 * byte)));
    }
    return acc;
#endif
}

// Each lane: acc + Σ over two bf16 of weight × activation; the pairs lie in 32 bits, the first one low.
inline Floats dot2(Floats acc, Words weights, uint32_t activations) {
#ifdef __AVX512BF16__
    return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(int32_t(activations)));
#else
    Words pair = Words{} + activations;
    acc += as_floats(weights << 16) * as_floats(pair << 16);
    return acc + as_floats(weights & 0xffff0000u) * as_floats(pair & 0xffff0000u);
#endif
}

// `to` may lie where `from` does.
inline void to_bf16_row(const float* from, int64_t n, uint16_t* to) {
    int64_t i = 0;
#ifdef __AVX512BF16__
    for (; i + kLanes <= n; i += kLanes) store(to + i, (Halves)_mm512_cvtneps_pbh((__m512)load<Floats>(from + i)));
#endif
    for (; i < n; ++i) {
        uint16_t half = to_bf16(load<float>(from + i));
        std::memcpy(to + i, &half, 2);
    }
}

inline float sum(Floats value) {
    // A fixed tree, so that the result depends on nothing but the value.
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)value);
#else
    float lanes[kLanes];
    store(lanes, value);
    for (int half = kLanes / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
#endif
}

inline float largest(Floats value) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)value);
#else
    float lanes[kLanes], best;
    store(lanes, value);
    best = lanes[0];
    for (int i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
    return best;
#endif
}

inline int32_t largest(Ints value) {
#ifdef __AVX512F__
    return _mm512_reduce_max_epi32((__m512i)value);
#else
    int32_t lanes[kLanes], best;
    store(lanes, value);
    best = lanes[0];
    for (int i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
    return best;
#endif
}

inline int32_t sum(Ints value) {
#ifdef __AVX512F__
    return _mm512_reduce_add_epi32((__m512i)value);
#else
    int32_t lanes[kLanes], total = 0;
    store(lanes, value);
    for (int i = 0; i < kLanes; ++i) total += lanes[i];
    return total;
#endif
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// The largest size of n numbers. Their bits are compared: as integers, NaNs are above all else, and none is lost.
inline float peak_of(const float* x, int64_t n) {
    Ints best{};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        Ints bits = load<Ints>(x + i) & 0x7fffffff;
        best = bits > best ? bits : best;
    }
    if (i < n) {
        float rest[kLanes] = {};
        std::memcpy(rest, x + i, 4 * (n - i));
        Ints bits = load<Ints>(rest) & 0x7fffffff;
        best = bits > best ? bits : best;
    }
    int32_t highest = largest(best);
    float peak;
    std::memcpy(&peak, &highest, 4);
    return peak;
}

// e^x to 2 units in the last place (Cephes' expf polynomial); 0 below −87, and x is taken as 88 above it.
inline Floats exponential(Floats x) {
    Floats low = all(-87.0f), high = all(88.0f);
#ifdef __AVX512F__
    // Of a NaN and a number these give the second, the NaN.
    Floats y = (Floats)_mm512_max_ps((__m512)low, _mm512_min_ps((__m512)high, (__m512)x));
#else
    auto vanishes = x < low;
    Floats y = x > high ? high : x;
    y = vanishes ? low : y;
#endif
    Floats shifted = y * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: rounds to the nearest integer
    Floats n = shifted - 12582912.0f;
    Floats r = y - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
#ifdef __AVX512F__
    __mmask16 stays = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
    return (Floats)_mm512_maskz_scalef_ps(stays, (__m512)p, (__m512)n);
#else
    Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
    Floats result = p * (Floats)exponent;
    // A NaN compares false everywhere and comes through.
    return vanishes ? Floats{} : result;
#endif
}

}  // namespace kajiya
