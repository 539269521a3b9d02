// The operators as C functions: the element type by number, everything else by pointer.
#include "attention.h"
#include "pointwise.h"
#include "updates.h"

using namespace kajiya;

// 0: float32, 1: bf16.
#define BY_TYPE(kind, call_floats, call_halves) \
    if ((kind) == 0) {                          \
        call_floats;                            \
    } else {                                    \
        call_halves;                            \
    }

extern "C" {

void kajiya_attention_forward(int32_t kind, const Attention* x) {
    BY_TYPE(kind, forward<Singles>(*x), forward<Pairs>(*x))
}

void kajiya_attention_backward(int32_t kind, const Attention* x) {
    BY_TYPE(kind, backward<Singles>(*x), backward<Pairs>(*x))
}

#define FLOATS(p) ((float*)(p))
#define HALVES(p) ((uint16_t*)(p))

void kajiya_norm_forward(int32_t kind, int64_t N, int64_t D, float eps, float shift, void* x, void* weight, void* y, float* scales,
                         int64_t n_threads) {
    Norm norm{D, eps, shift};
    BY_TYPE(kind, norm_forward(N, norm, FLOATS(x), FLOATS(weight), FLOATS(y), scales, n_threads),
            norm_forward(N, norm, HALVES(x), HALVES(weight), HALVES(y), scales, n_threads))
}

void kajiya_norm_backward(int32_t kind, int64_t N, int64_t D, float shift, void* x, void* weight, float* scales, void* grad_y,
                          void* grad_x, float* grad_weight, int64_t n_threads) {
    Norm norm{D, 0, shift};
    BY_TYPE(kind, norm_backward(N, norm, FLOATS(x), FLOATS(weight), scales, FLOATS(grad_y), FLOATS(grad_x), grad_weight, n_threads),
            norm_backward(N, norm, HALVES(x), HALVES(weight), scales, HALVES(grad_y), HALVES(grad_x), grad_weight, n_threads))
}

void kajiya_head_norms_forward(int32_t kind, const HeadNorms* x, void* heads, void* weights, void* y, float* scales) {
    BY_TYPE(kind, head_norms_forward(*x, FLOATS(heads), FLOATS(weights), FLOATS(y), scales),
            head_norms_forward(*x, HALVES(heads), HALVES(weights), HALVES(y), scales))
}

void kajiya_head_norms_backward(int32_t kind, const HeadNorms* x, void* heads, void* weights, float* scales, void* grad_y,
                                void* grad_heads, float* grad_weights) {
    BY_TYPE(kind,
            head_norms_backward(*x, FLOATS(heads), FLOATS(weights), scales, FLOATS(grad_y), FLOATS(grad_heads), grad_weights),
            head_norms_backward(*x, HALVES(heads), HALVES(weights), scales, HALVES(grad_y), HALVES(grad_heads), grad_weights))
}

// 0: SiLU, 1: GELU.
#define BY_GATE(gate, call, ...) ((gate) == 0 ? call<Silu>(__VA_ARGS__) : call<Gelu>(__VA_ARGS__))

void kajiya_gated_forward(int32_t kind, int32_t gate, int64_t N, int64_t F, void* both, void* y, int64_t n_threads) {
    BY_TYPE(kind, BY_GATE(gate, gated_forward, N, F, FLOATS(both), FLOATS(y), n_threads),
            BY_GATE(gate, gated_forward, N, F, HALVES(both), HALVES(y), n_threads))
}

void kajiya_gated_backward(int32_t kind, int32_t gate, int64_t N, int64_t F, void* both, void* grad_y, void* grad_both, void* y,
                           int64_t n_threads) {
    BY_TYPE(kind, BY_GATE(gate, gated_backward, N, F, FLOATS(both), FLOATS(grad_y), FLOATS(grad_both), FLOATS(y), n_threads),
            BY_GATE(gate, gated_backward, N, F, HALVES(both), HALVES(grad_y), HALVES(grad_both), HALVES(y), n_threads))
}

void kajiya_entropy(int32_t kind, const Entropy* x, void* logits, int32_t needs_grad) {
    BY_TYPE(kind, entropy(*x, FLOATS(logits), needs_grad != 0), entropy(*x, HALVES(logits), needs_grad != 0))
}

void kajiya_softmax_sums(int32_t kind, const Sums* x, const void* logits) {
    BY_TYPE(kind, softmax_sums(*x, (const float*)logits), softmax_sums(*x, (const uint16_t*)logits))
}

void kajiya_squares(int32_t kind, int64_t n_tensors, const void* const* tensors, const int64_t* sizes, double* sums,
                    int64_t n_threads) {
    BY_TYPE(kind, squares<float>(n_tensors, tensors, sizes, sums, n_threads),
            squares<uint16_t>(n_tensors, tensors, sizes, sums, n_threads))
}

void kajiya_adamw(int32_t kind, const AdamW* x) { BY_TYPE(kind, adamw<float>(*x), adamw<uint16_t>(*x)) }

}  // extern "C"
