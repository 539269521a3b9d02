// One step of a decoder like Llama or Gemma in one call: any mixture of prompt chunks and single tokens of many sequences.
//
// Every token is computed in the same order of operations whatever comes with it, so that its result is the same, to the
// bit, alone and in a batch, in one chunk or many, from a shared prefix or its own.
#include <algorithm>
#include <cstdlib>
#include <omp.h>

#include "activations.h"
#include "attention.h"
#include "linear.h"
#include "patches.h"
#include "phases.h"
#include "pointwise.h"

using namespace kajiya;

extern "C" {

enum GateKind : int32_t { kSiLU = 0, kGELUTanh = 1 };

struct Layer {
    const float *attention_norm, *mlp_norm;
    const float *query_norm, *key_norm;                    // may be null
    const float *attention_result_norm, *mlp_result_norm;  // of what is added to the stream; may be null
    const float *cos, *sin;                                // [position][rotary]
    int32_t rotary, window;  // window: positions that a token sees, its own one too; 0: all
    Linear qkv, out, gate_up, down;
    LayerCache cache;
};

struct Model {
    int32_t n_layers, width, n_query, n_key, head_width, gate, mlp_width, vocab;
    int32_t cache_kind, weight_kind, embedding_kind, max_positions;
    float epsilon, attention_scale, embedding_scale;
    float score_cap, logit_cap;  // 0: none
    const void* embedding;       // [vocab][width], fp32 or bf16
    const float* final_norm;
    Linear head;
    Layer* layers;
};

struct Step {
    int32_t n_tokens, n_sequences, table_stride, n_outputs, n_threads, n_hidden;
    const int32_t *tokens, *positions;   // [n_tokens], a sequence's tokens side by side and ascending
    const int32_t *starts;               // [n_sequences + 1]: where each sequence's tokens begin
    const int32_t* tables;               // [n_sequences][table_stride]: blocks of each sequence
    const Adapter* const* adapters;      // [n_sequences], null for none
    const int32_t* outputs;              // [n_outputs]: tokens whose logits are wanted
    const int32_t* hidden_rows;          // [n_hidden]: tokens whose last hidden state is wanted
    float* logits;                       // [n_outputs][vocab]
    float* hidden;                       // [n_hidden][width]
    int32_t* best;                       // [n_outputs]: the largest logit's place
    float *best_logprobs, *log_sums;     // [n_outputs]: NaN for a row that is not finite
};
}

namespace {

// Up to four queries of one key head of one sequence.
struct Work {
    int32_t sequence, head, token, n_tokens;
};

struct Run {
    const Model& model;
    const Step& step;
    Heads heads;
    int64_t n, qkv_width, query_width, padded, longest;
    Buffer stream, qkv, delta, gates, queries, scratch;
    Activations normed, mixed, gated, last;
    std::vector<Work> work;
    int64_t n_work = 0;
    std::vector<int32_t> sequence_of;
    bool has_adapters = false;
    std::vector<Patched> patched;
    int64_t tokens_each;
    Phases phases;

    Run(const Model& m, const Step& s)
        : model(m), step(s), heads{m.n_query, m.n_key, m.head_width, (m.head_width + 15) / 16 * 16, m.cache_kind, m.score_cap},
          n(s.n_tokens), qkv_width((m.n_query + 2 * m.n_key) * int64_t(m.head_width)),
          query_width(m.n_query * int64_t(m.head_width)), padded(heads.padded), longest(context(s)),
          stream(n * m.width), qkv(n * qkv_width), delta(n * m.width), gates(n * 2 * m.mlp_width),
          queries(n * m.n_query * padded), scratch(s.n_threads * 4 * longest), normed(n, m.width, m.weight_kind),
          mixed(n, query_width, m.weight_kind), gated(n, m.mlp_width, m.weight_kind),
          last(std::max(1, s.n_outputs), m.width, m.weight_kind),
          tokens_each(std::max<int64_t>(1, n / (4 * s.n_threads))), phases(16 * m.n_layers + 4) {
        plan();
    }

    static int64_t context(const Step& s) {
        int32_t most = 0;
        for (int t = 0; t < s.n_tokens; ++t) most = std::max(most, s.positions[t]);
        return (most + 1 + kBlock - 1) / kBlock * kBlock;
    }

    void plan() {
        int group = model.n_query / model.n_key, together = std::max(1, 4 / group);
        work.resize(n * model.n_key);
        sequence_of.resize(n);
        for (int s = 0; s < step.n_sequences; ++s) {
            has_adapters |= step.adapters[s] != nullptr;
            for (int t = step.starts[s]; t < step.starts[s + 1]; t += together) {
                int count = std::min(together, step.starts[s + 1] - t);
                for (int i = 0; i < count; ++i) sequence_of[t + i] = s;
                for (int head = 0; head < model.n_key; ++head) work[n_work++] = {s, head, t, count};
            }
        }
        if (has_adapters) {
            std::vector<const Adapter*> of_token(n);
            for (int64_t t = 0; t < n; ++t) of_token[t] = step.adapters[sequence_of[t]];
            patched = group_by_adapter(of_token);
        }
    }

    const int32_t* table_of(const Work& w) const { return step.tables + int64_t(w.sequence) * step.table_stride; }

    // ---------------------------------------------------------------- parts of a layer, each run by all threads

    void embed(int64_t& phase) {
        phases.share(phase, n, tokens_each, [&](int64_t t) {
            int64_t start = int64_t(step.tokens[t]) * model.width;
            float* to = stream.at + t * model.width;
            for (int64_t i = 0; i < model.width; ++i)
                to[i] = model.embedding_scale * (model.embedding_kind == kFloat32
                                                     ? ((const float*)model.embedding)[start + i]
                                                     : bf16_value(((const uint16_t*)model.embedding)[start + i]));
        });
    }

    // Adds what a part of a layer gave, normalized where it has a norm of its own, and normalizes for the next part.
    void add_and_normalize(int64_t& phase, bool adds, const float* result_norm, const float* weight) {
        phases.share(phase, n, tokens_each, [&](int64_t t) {
            float* x = stream.at + t * model.width;
            float* d = delta.at + t * model.width;
            if (result_norm) normalize(d, result_norm, model.width, model.epsilon, d);
            if (adds)
                for (int64_t i = 0; i < model.width; ++i) x[i] += d[i];
            normalize(x, weight, model.width, model.epsilon, normed.row(t));
            normed.seal(t);
        });
    }

    void multiply(int64_t& phase, const Linear& w, const Activations& x, float* y, int64_t rows) {
        int64_t panels = n_panels(w), chunk = std::max<int64_t>(1, panels / (step.n_threads * 4));
        Rows given = x.rows();
        phases.share_ranges(phase, panels, chunk,
                            [&](int64_t first, int64_t end) { product(given, rows, w, first, end, y, w.n_out); });
    }

    void adapt(int64_t& phase, int layer, int target, Activations& x, float* y, int64_t width) {
        if (!has_adapters) return;
        phases.share(phase, int64_t(patched.size()), 1, [&](int64_t item) {
            const Patched& group = patched[item];
            const float* from[kPatched];
            float* to[kPatched];
            for (int i = 0; i < group.count; ++i) {
                from[i] = x.row(group.tokens[i]);
                to[i] = y + group.tokens[i] * width;
            }
            add_parts(*group.adapter, layer, target, group.count, from, to);
        });
    }

    void place(int64_t& phase, Layer& layer) {
        int64_t width = model.head_width;
        phases.share(phase, n, tokens_each, [&](int64_t t) {
            float* row = qkv.at + t * qkv_width;
            int64_t position = step.positions[t];
            const float *cos = layer.cos + position * layer.rotary, *sin = layer.sin + position * layer.rotary;
            for (int h = 0; h < model.n_query + model.n_key; ++h) {
                const float* norm = h < model.n_query ? layer.query_norm : layer.key_norm;
                if (norm) normalize(row + h * width, norm, width, model.epsilon, row + h * width);
                rotate(row + h * width, cos, sin, layer.rotary);
            }
            for (int h = 0; h < model.n_query; ++h) {
                float* to = queries.at + (t * model.n_query + h) * padded;
                for (int64_t i = 0; i < padded; ++i)
                    to[i] = i < width ? row[h * width + i] * model.attention_scale : 0.0f;
                if (model.cache_kind == kCacheBFloat16) to_bf16_row(to, padded, (uint16_t*)to);
            }
            int64_t block = step.tables[int64_t(sequence_of[t]) * step.table_stride + position / kBlock];
            const float *keys = row + query_width, *values = keys + model.n_key * width;
            for (int h = 0; h < model.n_key; ++h)
                remember(heads, layer.cache, block, h, position % kBlock, keys + h * width, values + h * width);
        });
    }

    // Whether a head is whole groups of the next product's rows.
    bool seals_heads() const { return model.head_width % kGroup == 0; }

    // The first position that a token sees.
    static int64_t first_seen(const Layer& layer, int64_t position) {
        return layer.window ? std::max<int64_t>(0, position + 1 - layer.window) : 0;
    }

    void attend_all(int64_t& phase, Layer& layer) {
        int group = model.n_query / model.n_key;
        float* mine = scratch.at + omp_get_thread_num() * 4 * longest;
        // A few items behind one another, so that what comes next is known.
        phases.share(phase, n_work, std::max<int64_t>(1, n_work / (8 * step.n_threads)), [&](int64_t item) {
            const Work& w = work[item];
            // Blocks that none of these tokens sees are not looked at; the first token sees furthest back.
            int64_t skipped = first_seen(layer, step.positions[w.token]) / kBlock;
            const int32_t* table = table_of(w) + skipped;
            Coming coming{};
            if (item + 1 < n_work) {
                const Work& after = work[item + 1];
                int64_t position = step.positions[after.token], before = first_seen(layer, position) / kBlock;
                coming = {table_of(after) + before, after.head, position / kBlock + 1 - before};
            }
            int total = w.n_tokens * group;
            for (int first = 0; first < total; first += 4) {
                const float* from[4];
                float* to[4];
                int64_t lengths[4], unseen[4];
                int count = std::min(4, total - first);
                for (int q = 0; q < count; ++q) {
                    int64_t t = w.token + (first + q) / group, head = w.head * group + (first + q) % group;
                    from[q] = queries.at + (t * model.n_query + head) * padded;
                    to[q] = mixed.row(t) + head * model.head_width;
                    lengths[q] = step.positions[t] + 1 - skipped * kBlock;
                    unseen[q] = first_seen(layer, step.positions[t]) - skipped * kBlock;
                }
                auto attend_with = model.cache_kind == kCacheFloat32    ? attend<kCacheFloat32>
                                   : model.cache_kind == kCacheBFloat16 ? attend<kCacheBFloat16>
                                                                        : attend<kCacheInt8>;
                attend_with(from, lengths, unseen, count, heads, layer.cache, w.head, table, coming, mine, longest, to);
                for (int q = 0; q < count && seals_heads(); ++q) {
                    int64_t t = w.token + (first + q) / group;
                    mixed.seal(t, to[q] - mixed.row(t), model.head_width);
                }
            }
        });
        if (!seals_heads()) phases.share(phase, n, tokens_each, [&](int64_t t) { mixed.seal(t); });
    }

    // With adapters, what they add stands between a product and its activation.
    bool joins_gate() const { return !has_adapters && model.mlp_width % kPanel == 0; }

    // The product of gate and up, its activation, and the next product's rows of it, while they are at hand.
    template <class Gate>
    void multiply_and_gate(int64_t& phase, const Linear& w) {
        int64_t panels = model.mlp_width / kPanel, chunk = std::max<int64_t>(1, panels / (step.n_threads * 4));
        Rows given = normed.rows();
        phases.share_ranges(phase, panels, chunk, [&](int64_t first, int64_t end) {
            float g[kTogether * kPanel], u[kTogether * kPanel], found[kPanel];
            for (int64_t t = 0; t < n; t += kTogether)
                for (int64_t panel = first; panel < end; ++panel) {
                    int64_t count = std::min(kTogether, n - t);
                    bool is_near = n > kTogether;
                    panel_product(given, t, count, w, panel, is_near ? nullptr : panel_at(w, panels + panel), g, kPanel);
                    panel_product(given, t, count, w, panels + panel, is_near ? nullptr : panel_at(w, panel + 1), u, kPanel);
                    for (int64_t i = 0; i < count; ++i) {
                        activate<Gate>(g + i * kPanel, u + i * kPanel, kPanel, found);
                        gated.seal(t + i, panel * kPanel, kPanel, found);
                    }
                }
        });
    }

    template <class Gate>
    void gate(int64_t& phase) {
        int64_t width = model.mlp_width;
        phases.share(phase, n, tokens_each, [&](int64_t t) {
            const float* g = gates.at + t * 2 * width;
            activate<Gate>(g, g + width, width, gated.row(t));
            gated.seal(t);
        });
    }

    void finish(int64_t& phase) {
        const float* result_norm = model.layers[model.n_layers - 1].mlp_result_norm;
        phases.share(phase, step.n_outputs + step.n_hidden, 1, [&](int64_t i) {
            bool is_output = i < step.n_outputs;
            int64_t t = is_output ? step.outputs[i] : step.hidden_rows[i - step.n_outputs];
            const float *x = stream.at + t * model.width, *d = delta.at + t * model.width;
            float* to = is_output ? last.row(i) : step.hidden + (i - step.n_outputs) * model.width;
            // Neither is written here: a token may be wanted twice.
            if (result_norm) {
                normalize(d, result_norm, model.width, model.epsilon, to);
                d = to;
            }
            for (int64_t j = 0; j < model.width; ++j) to[j] = x[j] + d[j];
            normalize(to, model.final_norm, model.width, model.epsilon, to);
            if (is_output) last.seal(i);
        });
        if (!step.n_outputs) return;
        multiply(phase, model.head, last, step.logits, step.n_outputs);
        phases.share(phase, step.n_outputs, 1, [&](int64_t i) {
            float* logits = step.logits + i * model.vocab;
            if (model.logit_cap > 0) cap_all(logits, model.vocab, model.logit_cap);
            choose(logits, model.vocab, step.best + i, step.best_logprobs + i, step.log_sums + i);
        });
    }

    template <class Gate>
    void all_layers() {
        int64_t phase = 0;
        embed(phase);
        for (int i = 0; i < model.n_layers; ++i) {
            Layer& layer = model.layers[i];
            add_and_normalize(phase, i > 0, i > 0 ? model.layers[i - 1].mlp_result_norm : nullptr, layer.attention_norm);
            multiply(phase, layer.qkv, normed, qkv.at, n);
            adapt(phase, i, 0, normed, qkv.at, qkv_width);
            place(phase, layer);
            attend_all(phase, layer);
            multiply(phase, layer.out, mixed, delta.at, n);
            adapt(phase, i, 1, mixed, delta.at, model.width);
            add_and_normalize(phase, true, layer.attention_result_norm, layer.mlp_norm);
            if (joins_gate()) {
                multiply_and_gate<Gate>(phase, layer.gate_up);
            } else {
                multiply(phase, layer.gate_up, normed, gates.at, n);
                adapt(phase, i, 2, normed, gates.at, 2 * model.mlp_width);
                gate<Gate>(phase);
            }
            multiply(phase, layer.down, gated, delta.at, n);
            adapt(phase, i, 3, gated, delta.at, model.width);
        }
        finish(phase);
    }
};

}  // namespace

extern "C" {

int64_t kajiya_packed_bytes(int32_t kind, int64_t n_out, int64_t n_in) { return packed_bytes(kind, n_out, n_in); }

// Packs fp32 weights [n_out][n_in]; scales are [panels][groups][32] and unused in 16 and 32 bits.
void kajiya_pack(const float* weights, int32_t kind, int32_t n_out, int32_t n_in, void* to, uint16_t* scales, int32_t n_threads) {
    Linear shape{kind, n_out, n_in, 0, to, scales, nullptr};
#pragma omp parallel for schedule(static) num_threads(n_threads)
    for (int64_t panel = 0; panel < n_panels(shape); ++panel) pack_panel(weights, shape, panel, (uint8_t*)to, scales);
}

// y [n][n_out] = W x: the product alone, for tests and measurements.
void kajiya_product(const Linear* w, const float* x, int64_t n, float* y, int32_t n_threads) {
    Taking taking;
    Activations rows(n, w->n_in, w->kind);
    for (int64_t t = 0; t < n; ++t) {
        std::memcpy(rows.row(t), x + t * w->n_in, w->n_in * 4);
        rows.seal(t);
    }
    Rows given = rows.rows();
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads)
    for (int64_t panel = 0; panel < n_panels(*w); ++panel) product(given, n, *w, panel, panel + 1, y, w->n_out);
}

// Whether there was the memory for it; all of that is taken before anything is computed.
bool kajiya_step(const Model* model, const Step* step) {
    Taking taking;
    try {
        Run run(*model, *step);
#pragma omp parallel num_threads(step->n_threads)
        model->gate == kSiLU ? run.all_layers<SiLU>() : run.all_layers<GELUTanh>();
    } catch (const std::bad_alloc&) {
        return false;
    }
    return true;
}

// Copies a block of every layer.
void kajiya_copy_block(const Model* model, int32_t source, int32_t target) {
    int64_t padded = (model->head_width + 15) / 16 * 16, cells = model->n_key * padded * kBlock;
    int64_t bytes = cells * cell_bytes(model->cache_kind), scales = int64_t(model->n_key) * kBlock;
    for (int i = 0; i < model->n_layers; ++i) {
        LayerCache& cache = model->layers[i].cache;
        std::memcpy(cache.keys + target * bytes, cache.keys + source * bytes, bytes);
        std::memcpy(cache.values + target * bytes, cache.values + source * bytes, bytes);
        if (cache.key_scales) {
            std::memcpy(cache.key_scales + target * scales, cache.key_scales + source * scales, scales * 4);
            std::memcpy(cache.value_scales + target * scales, cache.value_scales + source * scales, scales * 4);
        }
    }
}
}
