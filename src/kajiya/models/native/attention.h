// Causal attention within segments, with rotary angles, forward and backward: scores are never held but for one block of queries.
//
// A query t of a row looks at the keys first[t] … t, so segments and sliding windows cost only the keys that they see.
// Online softmax: Milakov and Gimelshein, arXiv:1805.02867; backward from the rows' log-sums: FlashAttention, arXiv:2205.14135.
// Letters: B rows, N query heads, K key heads, T tokens, H width of a head.
#pragma once
#include <algorithm>
#include <vector>

#include "tiles.h"

namespace kajiya {

constexpr int64_t kQueries = 32;  // queries of a block
constexpr int64_t kKeys = 256;    // keys of a chunk
constexpr int64_t kWidestHead = 256;

// [B, n, T, H] with a last axis without gaps; strides in elements.
struct Heads {
    void* data;
    int64_t row, head, token;
};

struct Attention {
    int64_t B, N, K, T, H;
    float scale;
    const int32_t* first;  // [B, T]: the first key that each query sees
    const float* cos;      // [B, T, H], or null where the heads come turned already
    const float* sin;
    Heads q, k, v, out;
    float* log_sums;       // [B, N, T]
    Heads grad_out, grad_q, grad_k, grad_v;
    int64_t n_threads;
};

inline int64_t padded(int64_t n) { return (n + kQueries - 1) / kQueries * kQueries; }

template <class Kind>
struct Lanes {
    typedef typename Kind::Element Element;
    static const Element* at(const Heads& x, int64_t b, int64_t n, int64_t t) {
        return (const Element*)x.data + b * x.row + n * x.head + t * x.token;
    }
    static Element* into(const Heads& x, int64_t b, int64_t n, int64_t t) {
        return (Element*)x.data + b * x.row + n * x.head + t * x.token;
    }
    static void write(const float* from, int64_t H, Element* to) {
        for (int64_t h = 0; h < H; h += kLanes) store_element(to + h, load<Floats>(from + h));
    }
};

// Ask for what a later block of a head reads: tokens lie far apart in memory, too far for the processor to see them coming.
// (Inlined at once, or the compiler takes a call without effect away.)
template <class Kind>
__attribute__((always_inline)) inline void prefetch(const Attention& x, const Heads& from, int64_t b, int64_t n, int64_t t) {
    if (t >= x.T) return;
    const char* data = (const char*)Lanes<Kind>::at(from, b, n, t);
    for (int64_t byte = 0; byte < x.H * int64_t(sizeof(typename Kind::Element)); byte += 64) __builtin_prefetch(data + byte);
}

// Turn a head by the token's angles; backwards for gradients. `to` may lie where `from` does.
template <class From, class To>
inline void turn(const From* from, const float* cos, const float* sin, int64_t H, bool backwards, To* to) {
    int64_t half = H / 2, j = 0;
    for (; j + kLanes <= half; j += kLanes) {
        Floats a = load_element(from + j), b = load_element(from + j + half);
        Floats cos_a = load<Floats>(cos + j), cos_b = load<Floats>(cos + j + half);
        Floats sin_a = load<Floats>(sin + j), sin_b = load<Floats>(sin + j + half);
        store_element(to + j, backwards ? a * cos_a + b * sin_b : a * cos_a - b * sin_a);
        store_element(to + j + half, backwards ? b * cos_b - a * sin_a : b * cos_b + a * sin_b);
    }
    for (; j < half; ++j) {  // a half that fills no vector
        float a = one(from + j), b = one(from + j + half);
        store_one(to + j, backwards ? a * cos[j] + b * sin[j + half] : a * cos[j] - b * sin[j]);
        store_one(to + j + half, backwards ? b * cos[j + half] - a * sin[j] : b * cos[j + half] + a * sin[j + half]);
    }
}

// One head's tokens in the three orders that the products read; an order that is null is not made. Padding is zero.
template <class Kind>
struct Packed {
    uint32_t* plain;   // [T][H / per]: words along the width
    uint32_t* by_width;   // [H / per][T]: lanes are tokens, words along the width
    uint32_t* by_token;   // [T / per][H]: lanes are the width, words along the tokens
};

// Tokens go sixteen at a time; `begin` and `end` lie on such borders.
template <class Kind>
void pack(const Attention& x, const Heads& from, int64_t b, int64_t n, int64_t begin, int64_t end, int64_t length, bool turned,
          Packed<Kind> to) {
    typedef typename Kind::Element Element;
    constexpr int P = Kind::kPer;
    int64_t H = x.H, words = H / P, row = to.plain ? words : kWidestHead;
    alignas(64) uint32_t own[kLanes * kWidestHead];
    for (int64_t t = begin; t < end; t += kLanes) {
        int64_t at = t - begin;
        uint32_t* rows = to.plain ? to.plain + at * words : own;
        for (int i = 0; i < kLanes; ++i) {
            prefetch<Kind>(x, from, b, n, t + i + kQueries);
            Element* into = (Element*)(rows + i * row);
            int64_t angle = (b * x.T + t + i) * H;
            if (t + i >= x.T)
                std::fill(into, into + H, Element(0));
            else if (turned)
                turn(Lanes<Kind>::at(from, b, n, t + i), x.cos + angle, x.sin + angle, H, false, into);
            else
                for (int64_t h = 0; h < H; h += kLanes) copy_lanes(Lanes<Kind>::at(from, b, n, t + i) + h, into + h);
        }
        if (to.by_width) {
            int64_t w = 0;
            for (; w + kLanes <= words; w += kLanes) transpose(rows + w, row, to.by_width + w * length + at, length);
            for (; w < words; ++w)
                for (int i = 0; i < kLanes; ++i) to.by_width[w * length + at + i] = rows[i * row + w];
        }
        if (to.by_token)
            for (int i = 0; i < kLanes; i += P)
                for (int64_t h = 0; h < H; h += kLanes)
                    store(to.by_token + (at + i) / P * H + h,
                          beside((Element*)(rows + i * row) + h, (Element*)(rows + (i + P - 1) * row) + h));
    }
}

// Memory of one thread, kept from call to call.
inline uint32_t* scratch(size_t words) {
    static thread_local std::vector<uint32_t> memory;
    if (memory.size() < words + kLanes) memory.resize(words + kLanes);
    return (uint32_t*)(((uintptr_t)memory.data() + 63) & ~uintptr_t(63));
}

// Hands out parts of a thread's memory; counts first, then gives.
struct Parts {
    uint32_t* base;
    size_t used = 0;
    uint32_t* take(size_t words) {
        uint32_t* part = base ? base + used : nullptr;
        used += (words + kLanes - 1) / kLanes * kLanes;
        return part;
    }
    float* floats(size_t n) { return (float*)take(n); }
};

inline Ints iota() { return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }

// Scores of keys that the query does not see become −∞.
inline Floats seen(Floats scores, int64_t key, int64_t first, int64_t last) {
    if (key >= first && key + kLanes - 1 <= last) return scores;
    Ints at = iota() + int32_t(key);
    auto hidden = (at < int32_t(first)) | (at > int32_t(last));
    return hidden ? all(-INFINITY) : scores;
}

// The keys that the queries [q0, q1) see begin here, on a whole word.
template <class Kind>
inline int64_t first_key(const Attention& x, int64_t b, int64_t q0, int64_t q1) {
    const int32_t* first = x.first + b * x.T;
    return *std::min_element(first + q0, first + q1) / Kind::kPer * Kind::kPer;
}

template <class Kind>
void forward_head(const Attention& x, int64_t b, int64_t n, int64_t length, Packed<Kind> k, Packed<Kind> v, Parts parts) {
    typedef typename Kind::Element Element;
    constexpr int P = Kind::kPer;
    int64_t H = x.H, words = H / P;
    Packed<Kind> q{parts.take(kQueries * words), nullptr, nullptr};
    float* scores = parts.floats(kQueries * kKeys);
    uint32_t* weights = parts.take(kQueries * kKeys);
    float* sums = parts.floats(kQueries * H);
    float largest_of[kQueries], sum_of[kQueries];
    for (int64_t q0 = 0; q0 < x.T; q0 += kQueries) {
        int64_t n_rows = std::min(kQueries, x.T - q0);
        pack<Kind>(x, x.q, b, n, q0, q0 + kQueries, kQueries, x.cos != nullptr, q);
        std::fill(largest_of, largest_of + kQueries, -INFINITY);
        std::fill(sum_of, sum_of + kQueries, 0.0f);
        std::fill(sums, sums + kQueries * H, 0.0f);
        int64_t end = q0 + n_rows;
        for (int64_t k0 = first_key<Kind>(x, b, q0, end); k0 < end; k0 += kKeys) {
            int64_t width = std::min(kKeys, (end - k0 + kLanes * 2 - 1) / (kLanes * 2) * (kLanes * 2));
            product<Kind, false>(kQueries, width, words, {q.plain, words, 1}, {k.by_width + k0, length}, scores, kKeys);
            for (int64_t r = 0; r < n_rows; ++r) {
                int64_t t = q0 + r, first = x.first[b * x.T + t];
                float* row = scores + r * kKeys;
                Floats top = all(-INFINITY);
                for (int64_t j = 0; j < width; j += kLanes) {
                    Floats s = seen(load<Floats>(row + j) * x.scale, k0 + j, first, t);
                    store(row + j, s);
                    top = larger(top, s);
                }
                float peak = std::max(largest_of[r], largest(top));
                Element* out = (Element*)(weights + r * (kKeys / P));
                if (peak == -INFINITY) {  // none of this chunk's keys is seen yet
                    std::memset(out, 0, width * sizeof(Element));
                    continue;
                }
                Floats total{};
                for (int64_t j = 0; j < width; j += kLanes) {
                    Floats p = exponential(load<Floats>(row + j) - peak);
                    total += p;
                    store_element(out + j, p);
                }
                if (largest_of[r] != peak) {
                    float shrink = largest_of[r] == -INFINITY ? 0.0f : std::exp(largest_of[r] - peak);
                    sum_of[r] *= shrink;
                    for (int64_t h = 0; h < H; h += kLanes)
                        store(sums + r * H + h, load<Floats>(sums + r * H + h) * shrink);
                    largest_of[r] = peak;
                }
                sum_of[r] += sum(total);
            }
            product<Kind, true>(kQueries, H, width / P, {weights, kKeys / P, 1}, {v.by_token + k0 / P * H, H}, sums, H);
        }
        for (int64_t r = 0; r < n_rows; ++r) {
            Element* out = Lanes<Kind>::into(x.out, b, n, q0 + r);
            for (int64_t h = 0; h < H; h += kLanes)
                store_element(out + h, load<Floats>(sums + r * H + h) / sum_of[r]);
            x.log_sums[(b * x.N + n) * x.T + q0 + r] = largest_of[r] + std::log(sum_of[r]);
        }
    }
}

template <class Kind>
void forward(const Attention& x) {
    constexpr int P = Kind::kPer;
    int64_t length = padded(x.T) + 2 * kQueries;  // chunks may read past the end
#pragma omp parallel for num_threads(x.n_threads) schedule(dynamic)
    for (int64_t task = 0; task < x.B * x.K; ++task) {
        int64_t b = task / x.K, g = task % x.K, words = x.H / P, group = x.N / x.K;
        size_t need = length * (words + x.H / P) + kQueries * (words + 2 * kKeys + x.H) + 64 * kLanes;
        Parts parts{scratch(need)};
        Packed<Kind> k{nullptr, parts.take(words * length), nullptr};
        Packed<Kind> v{nullptr, nullptr, parts.take(length / P * x.H)};
        pack<Kind>(x, x.k, b, g, 0, length, length, x.cos != nullptr, k);
        pack<Kind>(x, x.v, b, g, 0, length, length, false, v);
        for (int64_t n = g * group; n < (g + 1) * group; ++n) forward_head<Kind>(x, b, n, length, k, v, parts);
    }
}

// What the backward pass of one key head holds.
template <class Kind>
struct Held {
    Packed<Kind> k, v, q, grad_out;
    float *scores, *grads, *grad_q, *grad_k, *grad_v;
    uint32_t *weights_q, *slopes, *slopes_q;
    Held(Parts& parts, int64_t length, int64_t H) {
        constexpr int P = Kind::kPer;
        int64_t words = H / P;
        k = {nullptr, parts.take(words * length), parts.take(length / P * H)};
        v = {nullptr, parts.take(words * length), nullptr};
        q = {parts.take(kQueries * words), nullptr, parts.take(kQueries / P * H)};
        grad_out = {parts.take(kQueries * words), nullptr, parts.take(kQueries / P * H)};
        scores = parts.floats(kQueries * kKeys);
        grads = parts.floats(kQueries * kKeys);
        grad_q = parts.floats(kQueries * H);
        grad_k = parts.floats(length * H);
        grad_v = parts.floats(length * H);
        weights_q = parts.take(kQueries / P * kKeys);
        slopes = parts.take(kQueries / P * kKeys);
        slopes_q = parts.take(kQueries / P * kKeys);
    }
};

// Softmax weights of a block in place of its scores, and the scores' gradients in place of the weights'.
template <class Kind>
inline void slopes_of(const Attention& x, int64_t b, int64_t n, int64_t q0, int64_t k0, int64_t width, const float* deltas,
                      Held<Kind>& held) {
    typedef typename Kind::Element Element;
    constexpr int P = Kind::kPer;
    int64_t n_rows = std::min(kQueries, x.T - q0);
    for (int64_t r = 0; r < kQueries; r += P) {
        float log_sum[P], delta[P];
        int64_t first[P], last[P];
        for (int i = 0; i < P; ++i) {
            bool is_there = r + i < n_rows;
            int64_t t = q0 + r + i;
            log_sum[i] = is_there ? x.log_sums[(b * x.N + n) * x.T + t] : 0.0f;
            delta[i] = is_there ? deltas[r + i] : 0.0f;
            first[i] = is_there ? x.first[b * x.T + t] : 1;
            last[i] = is_there ? t : 0;
        }
        for (int64_t j = 0; j < width; j += kLanes) {
            Floats p[P], slope[P];
            for (int i = 0; i < P; ++i) {
                int64_t at = (r + i) * kKeys + j;
                Floats s = seen(load<Floats>(held.scores + at) * x.scale, k0 + j, first[i], last[i]);
                p[i] = exponential(s - log_sum[i]);
                slope[i] = p[i] * (load<Floats>(held.grads + at) - delta[i]) * x.scale;
                store_element((Element*)(held.slopes + (r + i) * (kKeys / P)) + j, slope[i]);
            }
            if (P == 2) {
                store(held.weights_q + r / P * kKeys + j, paired(p[0], p[P - 1]));
                store(held.slopes_q + r / P * kKeys + j, paired(slope[0], slope[P - 1]));
            } else {
                store(held.weights_q + r * kKeys + j, p[0]);
                store(held.slopes_q + r * kKeys + j, slope[0]);
            }
        }
    }
}

template <class Kind>
void backward_head(const Attention& x, int64_t b, int64_t n, int64_t length, Held<Kind>& held) {
    constexpr int P = Kind::kPer;
    int64_t H = x.H, words = H / P;
    bool turned = x.cos != nullptr;
    for (int64_t q0 = 0; q0 < x.T; q0 += kQueries) {
        int64_t n_rows = std::min(kQueries, x.T - q0), end = q0 + n_rows;
        pack<Kind>(x, x.q, b, n, q0, q0 + kQueries, kQueries, turned, held.q);
        pack<Kind>(x, x.grad_out, b, n, q0, q0 + kQueries, kQueries, false, held.grad_out);
        float deltas[kQueries] = {};
        for (int64_t r = 0; r < n_rows; ++r) {
            Floats total{};
            prefetch<Kind>(x, x.out, b, n, q0 + r + kQueries);
            auto *o = Lanes<Kind>::at(x.out, b, n, q0 + r), *g = Lanes<Kind>::at(x.grad_out, b, n, q0 + r);
            for (int64_t h = 0; h < H; h += kLanes) total += load_element(o + h) * load_element(g + h);
            deltas[r] = sum(total);
        }
        std::fill(held.grad_q, held.grad_q + kQueries * H, 0.0f);
        for (int64_t k0 = first_key<Kind>(x, b, q0, end); k0 < end; k0 += kKeys) {
            int64_t width = std::min(kKeys, (end - k0 + kLanes * 2 - 1) / (kLanes * 2) * (kLanes * 2));
            product<Kind, false>(kQueries, width, words, {held.q.plain, words, 1}, {held.k.by_width + k0, length},
                                 held.scores, kKeys);
            product<Kind, false>(kQueries, width, words, {held.grad_out.plain, words, 1}, {held.v.by_width + k0, length},
                                 held.grads, kKeys);
            slopes_of<Kind>(x, b, n, q0, k0, width, deltas, held);
            int64_t pairs = kQueries / P;
            product<Kind, true>(width, H, pairs, {held.weights_q, 1, kKeys}, {held.grad_out.by_token, H},
                                held.grad_v + k0 * H, H);
            product<Kind, true>(width, H, pairs, {held.slopes_q, 1, kKeys}, {held.q.by_token, H}, held.grad_k + k0 * H, H);
            product<Kind, true>(kQueries, H, width / P, {held.slopes, kKeys / P, 1}, {held.k.by_token + k0 / P * H, H},
                                held.grad_q, H);
        }
        for (int64_t r = 0; r < n_rows; ++r) {
            int64_t angle = (b * x.T + q0 + r) * H;
            auto* into = Lanes<Kind>::into(x.grad_q, b, n, q0 + r);
            if (turned)
                turn(held.grad_q + r * H, x.cos + angle, x.sin + angle, H, true, into);
            else
                Lanes<Kind>::write(held.grad_q + r * H, H, into);
        }
    }
}

template <class Kind>
void backward(const Attention& x) {
    int64_t length = padded(x.T) + 2 * kQueries;
    // One key head is one thread's, whose sums over its query heads have one order whatever the number of threads.
#pragma omp parallel for num_threads(x.n_threads) schedule(dynamic)
    for (int64_t task = 0; task < x.B * x.K; ++task) {
        int64_t b = task / x.K, g = task % x.K, group = x.N / x.K;
        Parts count{nullptr};
        Held<Kind> counted(count, length, x.H);
        Parts parts{scratch(count.used)};
        Held<Kind> held(parts, length, x.H);
        bool turned = x.cos != nullptr;
        pack<Kind>(x, x.k, b, g, 0, length, length, turned, held.k);
        pack<Kind>(x, x.v, b, g, 0, length, length, false, held.v);
        std::fill(held.grad_k, held.grad_k + length * x.H, 0.0f);
        std::fill(held.grad_v, held.grad_v + length * x.H, 0.0f);
        for (int64_t n = g * group; n < (g + 1) * group; ++n) backward_head<Kind>(x, b, n, length, held);
        for (int64_t t = 0; t < x.T; ++t) {
            int64_t angle = (b * x.T + t) * x.H;
            auto* into = Lanes<Kind>::into(x.grad_k, b, g, t);
            if (turned)
                turn(held.grad_k + t * x.H, x.cos + angle, x.sin + angle, x.H, true, into);
            else
                Lanes<Kind>::write(held.grad_k + t * x.H, x.H, into);
            Lanes<Kind>::write(held.grad_v + t * x.H, x.H, Lanes<Kind>::into(x.grad_v, b, g, t));
        }
    }
}

}  // namespace kajiya
