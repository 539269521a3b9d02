// An optimizer's pass over its tensors: norms of gradients, and AdamW's update, which reads each gradient and writes each weight once.
//
// Tensors are cut into pieces of one size, which threads take in any order; no sum depends on who took which.
#pragma once
#include <cmath>
#include <cstring>
#include <vector>

#include "tiles.h"

namespace kajiya {

constexpr int64_t kPiece = 1 << 14;  // elements

// Where each piece of tensors of these sizes begins: (tensor, first element).
inline std::vector<std::pair<int64_t, int64_t>> pieces_of(int64_t n_tensors, const int64_t* sizes) {
    std::vector<std::pair<int64_t, int64_t>> pieces;
    for (int64_t i = 0; i < n_tensors; ++i)
        for (int64_t at = 0; at < sizes[i]; at += kPiece) pieces.push_back({i, at});
    return pieces;
}

// Sixteen elements, or the last `n` of a tensor; what is behind them is zero and stays as it is.
template <class E>
inline Floats load_some(const E* from, int64_t n) {
    if (n >= kLanes) return load_element(from);
    E some[kLanes] = {};
    std::memcpy(some, from, n * sizeof(E));
    return load_element(some);
}

template <class E>
inline void store_some(E* to, Floats value, int64_t n) {
    if (n >= kLanes) return store_element(to, value);
    E some[kLanes];
    store_element(some, value);
    std::memcpy(to, some, n * sizeof(E));
}

// The sum of squares of each tensor.
template <class E>
void squares(int64_t n_tensors, const void* const* tensors, const int64_t* sizes, double* sums, int64_t n_threads) {
    auto pieces = pieces_of(n_tensors, sizes);
    std::vector<double> partial(pieces.size());
#pragma omp parallel for num_threads(n_threads) schedule(dynamic, 8)
    for (size_t p = 0; p < pieces.size(); ++p) {
        auto [i, begin] = pieces[p];
        const E* x = (const E*)tensors[i] + begin;
        int64_t n = std::min(kPiece, sizes[i] - begin);
        Floats total[4] = {};
        for (int64_t at = 0, turn = 0; at < n; at += kLanes, turn = (turn + 1) % 4) {
            Floats value = load_some(x + at, n - at);
            total[turn] += value * value;
        }
        partial[p] = sum((total[0] + total[1]) + (total[2] + total[3]));
    }
    for (int64_t i = 0; i < n_tensors; ++i) sums[i] = 0;
    for (size_t p = 0; p < pieces.size(); ++p) sums[pieces[p].first] += partial[p];
}

struct AdamW {
    int64_t n_tensors;
    const int64_t* sizes;
    const double* steps;  // the number of each tensor's update, from 1
    const void* const* grads;
    float* const *masters, *const *means, *const *squares;
    uint16_t* const* weights;  // bf16
    double lr, beta1, beta2, eps, decay;
    int64_t n_threads;
};

// Decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101, algorithm 2); the weights are the masters, rounded.
template <class E>
void adamw(const AdamW& x) {
    auto pieces = pieces_of(x.n_tensors, x.sizes);
    float keep = float(1 - x.lr * x.decay), less1 = float(1 - x.beta1), beta2 = float(x.beta2), less2 = float(1 - x.beta2);
    float eps = float(x.eps);
#pragma omp parallel for num_threads(x.n_threads) schedule(dynamic, 8)
    for (size_t p = 0; p < pieces.size(); ++p) {
        auto [i, begin] = pieces[p];
        float rate = float(x.lr / (1 - std::pow(x.beta1, x.steps[i])));
        float root = float(std::sqrt(1 - std::pow(x.beta2, x.steps[i])));
        const E* grad = (const E*)x.grads[i];
        int64_t end = std::min(begin + kPiece, x.sizes[i]);
        for (int64_t at = begin; at < end; at += kLanes) {
            int64_t n = end - at;
            Floats g = load_some(grad + at, n), mean = load_some(x.means[i] + at, n), square = load_some(x.squares[i] + at, n);
            Floats master = load_some(x.masters[i] + at, n) * keep;
            mean += (g - mean) * less1;
            square = square * beta2 + g * g * less2;
            master -= rate * mean / (square_root(square) / root + eps);
            store_some(x.means[i] + at, mean, n);
            store_some(x.squares[i] + at, square, n);
            store_some(x.masters[i] + at, master, n);
            store_some(x.weights[i] + at, master, n);
        }
    }
}

}  // namespace kajiya
