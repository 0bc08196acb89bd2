// One token of many sequences through a whole decoder with packed weights. Between the blocks, and inside all but Mamba-2,
// numbers are float32. In int8 and int4 up to 16 sequences, and in bfloat16 any number, each gets what it gets alone.
//
// Shape letters: S sequences, D model, H query heads, K KV heads, P head dim, I intermediate channels, C channels of the
// convolution, N state, G groups, V vocabulary.
#include <cmath>
#include <vector>

#include "attend.h"
#include "packed.h"
#include "pool.h"

extern "C" void ssd_step(int, const void*, long, const float*, const float*, const void*, long, const void*, long,
                         const float*, float*, void*, long, long, long, long, long, int);
extern "C" void conv_step(int, int, const void*, long, const void*, const void*, void*, void*, long, long, long, int);
extern "C" void gated_norm_forward(int, const void*, long, const void*, long, const float*, void*, long, long, long,
                                   float, int);

namespace {

enum Mixer { ATTENTION, FEED_FORWARD, MAMBA2 };
enum Activation { SILU, GELU, GELU_TANH, RELU2 };

// A block as ops/native/decode.py fills it. `first` reads the normalised stream, `second` gives what the block adds.
struct Block {
    long mixer;
    const float* norm;     // (D,)
    Packed first, second;  // q, k, v and o; gate, up and down; in_proj and out_proj
    // Attention. Where k and v begin among the outputs of `first`; norms of heads (P,) or null.
    long heads, kv_heads, dim, at_key, at_value, rope, window, table;
    const float *q_norm, *k_norm;
    // FFN. Where `up` begins, 0 without a gate.
    long activation, at_up;
    // Mamba-2. conv (C, kernel); conv_bias (C,) or null; A negative; A, D, dt_bias (H,); gate_norm (HP,).
    long state, groups, kernel, norm_groups;
    const float *conv, *conv_bias, *A, *D, *dt_bias, *gate_norm;
    float dt_min, dt_max;
};

struct Model {
    long width, vocabulary, count;
    const Block* blocks;
    const float* norm;
    const Packed *embedding, *head;
    float eps;
};

// What a block remembers: keys and values in pages of bfloat16, or the conv's inputs (slots, kernel - 1, C) in bfloat16
// and states (slots, H, P, N) in float32. Strides in numbers; `page` is also that of a slot.
struct Memory {
    void *first, *second;
    long first_page, second_page, token, head, size;
};

struct Step {
    const int64_t* ids;        // (S,)
    const int32_t* lengths;    // (S,): tokens of each sequence, this one included
    const int32_t* slots;      // (S,)
    const int32_t* const* tables;  // for every kind of window: (S, table_rows[i])
    const long* table_rows;
    const bf16 *cos, *sin;  // (positions, P), sin signed
    long count;
    int threads;
};

struct Buffer {
    std::vector<float> numbers;
    float* of(long size) {
        if (long(numbers.size()) < size) numbers.resize(size);
        return numbers.data();
    }
};

void rms_norm(const float* x, const float* weight, float* y, long size, float eps) {
    vec squares{};
    each_vec(size, [&](long i, auto part) {
        const vec v = load(x + i, part);
        squares += v * v;
    });
    const float scale = 1.0f / std::sqrt(sum(squares) / size + eps);
    each_vec(size, [&](long i, auto part) { store(y + i, load(x + i, part) * scale * load(weight + i, part), part); });
}

void add(float* x, const float* more, long size) {
    each_vec(size, [&](long i, auto part) { store(x + i, load(x + i, part) + load(more + i, part), part); });
}

class Decoding {
   public:
    Decoding(const Model& model, const Memory* memory, const Step& step) : m(model), memory_(memory), s(step) {}

    void run(float* logits) {
        thread_local Buffer stream, normal, added;
        const long size = s.count * m.width;
        x_ = stream.of(size), normal_ = normal.of(size);
        for (long r = 0; r < s.count; r++) one_row(*m.embedding, s.ids[r], x_ + r * m.width);
        for (long i = 0; i < m.count; i++) {
            const Block& b = m.blocks[i];
            float* more = added.of(s.count * b.second.outputs);
            normalise(b.norm);
            if (b.mixer == ATTENTION) attention(b, memory_[i], more);
            if (b.mixer == FEED_FORWARD) feed_forward(b, more);
            if (b.mixer == MAMBA2) mamba2(b, memory_[i], more);
            for (long r = 0; r < s.count; r++) add(x_ + r * m.width, more + r * b.second.outputs, m.width);
        }
        normalise(m.norm);
        multiply(*m.head, normal_, m.width, logits, m.head->outputs, s.count, s.threads);
    }

   private:
    void normalise(const float* weight) {
        for (long r = 0; r < s.count; r++) rms_norm(x_ + r * m.width, weight, normal_ + r * m.width, m.width, m.eps);
    }

    float* project(const Block& b) {
        thread_local Buffer inner;
        float* y = inner.of(s.count * b.first.outputs);
        multiply(b.first, normal_, m.width, y, b.first.outputs, s.count, s.threads);
        return y;
    }

    void attention(const Block& b, const Memory& held, float* more) {
        thread_local Buffer queries, answers;
        const long wide = b.heads * b.dim, row = b.first.outputs;
        float *qkv = project(b), *q = queries.of(s.count * wide), *out = answers.of(s.count * wide);
        const Pages keys{(bf16*)held.first, held.first_page, held.token, held.head};
        const Pages values{(bf16*)held.second, held.second_page, held.token, held.head};
        const int32_t* tables = s.tables[b.table];
        for (long r = 0; r < s.count; r++) {
            const int32_t* table = tables + r * s.table_rows[b.table];
            const long position = s.lengths[r] - 1;
            float* tokens = qkv + r * row;
            for (long h = 0; h < b.heads; h++) {
                head(b, tokens + h * b.dim, b.q_norm, position);
                memcpy(q + (r * b.heads + h) * b.dim, tokens + h * b.dim, b.dim * sizeof(float));
            }
            for (long k = 0; k < b.kv_heads; k++) {
                head(b, tokens + b.at_key + k * b.dim, b.k_norm, position);
                lay(tokens + b.at_key + k * b.dim, keys.at(table, held.size, position, k), b.dim);
                lay(tokens + b.at_value + k * b.dim, values.at(table, held.size, position, k), b.dim);
            }
        }
        attend({q, out, tables, s.lengths, s.table_rows[b.table], held.size, s.count, b.heads, b.kv_heads, b.dim, b.window},
               keys, values, s.threads);
        multiply(b.second, out, wide, more, b.second.outputs, s.count, s.threads);
    }

    // Norm and rotation of one head, in place.
    void head(const Block& b, float* x, const float* norm, long position) const {
        if (norm) rms_norm(x, norm, x, b.dim, m.eps);
        if (!b.rope) return;
        const bf16 *cos = s.cos + position * b.dim, *sin = s.sin + position * b.dim;
        const long half = b.dim / 2;
        each_vec(half, [&](long p, auto part) {
            const long o = p + half;
            const vec low = load(x + p, part), high = load(x + o, part);
            store(x + p, low * load(cos + p, part) + high * load(sin + p, part), part);
            store(x + o, high * load(cos + o, part) + low * load(sin + o, part), part);
        });
    }

    static void lay(const float* from, bf16* to, long size) {
        each_vec(size, [&](long i, auto part) { store(to + i, load(from + i, part), part); });
    }

    void feed_forward(const Block& b, float* more) {
        float* y = project(b);
        const long row = b.first.outputs, size = b.second.inputs;
        for (long r = 0; r < s.count; r++) {
            float* x = y + r * row;
            activate(b.activation, x, size);
            if (b.at_up)
                each_vec(size, [&](long i, auto part) { store(x + i, load(x + i, part) * load(x + b.at_up + i, part), part); });
        }
        multiply(b.second, y, row, more, b.second.outputs, s.count, s.threads);
    }

    static void activate(long kind, float* x, long size) {
        if (kind == GELU)
            for (long i = 0; i < size; i++) x[i] *= 0.5f * (1.0f + std::erf(x[i] * float(M_SQRT1_2)));
        if (kind == GELU_TANH)
            for (long i = 0; i < size; i++)
                x[i] *= 0.5f * (1.0f + std::tanh(float(M_2_SQRTPI * M_SQRT1_2) * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
        if (kind == SILU || kind == RELU2)
            each_vec(size, [&](long i, auto part) {
                const vec v = load(x + i, part), positive = select(v > 0.0f, v, vec{});
                store(x + i, kind == SILU ? v * sigmoid(v) : positive * positive, part);
            });
    }

    // The middle of the block in bfloat16, as its memory is. One sequence shares its heads among the threads; of several
    // each is an item of its own.
    void mamba2(const Block& b, const Memory& held, float* more) {
        thread_local Buffer answers;
        const long inner = b.heads * b.dim;
        float *tokens = project(b), *out = answers.of(s.count * inner);
        const int outside = s.count > 1 ? threads_for(s.threads, s.count * inner * b.state) : 1;
        parallel(outside, s.count, [&](long r, int) {
            scan_row(b, held, s.slots[r], tokens + r * b.first.outputs, out + r * inner, s.count > 1 ? 1 : s.threads);
        });
        multiply(b.second, out, inner, more, b.second.outputs, s.count, s.threads);
    }

    // token: z, x B C and dt; out (HP,).
    void scan_row(const Block& b, const Memory& held, long slot, float* token, float* out, int threads) const {
        const long inner = b.heads * b.dim, side = b.groups * b.state, channels = inner + 2 * side;
        thread_local std::vector<bf16> low;
        low.resize(2 * inner + 2 * channels + 2 * inner);
        bf16 *z = low.data(), *in = z + inner, *mixed = in + channels, *y = mixed + channels, *gated = y + inner;
        lay(token, z, inner), lay(token + inner, in, channels);
        conv_step(1, 0, in, channels, b.conv, b.conv_bias, (bf16*)held.first + slot * held.first_page, mixed, 1, channels,
                  b.kernel, 1);
        float* dt = token + inner + channels;
        for (long h = 0; h < b.heads; h++) dt[h] = time_step(b, dt[h] + b.dt_bias[h]);
        float* state = (float*)held.second + slot * held.second_page;
        ssd_step(1, mixed, channels, dt, b.A, mixed + inner, channels, mixed + inner + side, channels, b.D, state, y, 1,
                 b.heads, b.dim, b.groups, b.state, threads);
        gated_norm_forward(1, y, inner, z, inner, b.gate_norm, gated, 1, inner, b.norm_groups, m.eps, 1);
        each_vec(inner, [&](long i, auto part) { store(out + i, load(gated + i, part), part); });
    }

    static float time_step(const Block& b, float x) {
        const float soft = x > 20.0f ? x : std::log1p(std::exp(x));
        return soft < b.dt_min ? b.dt_min : soft > b.dt_max ? b.dt_max : soft;
    }

    const Model& m;
    const Memory* memory_;
    const Step& s;
    float *x_ = nullptr, *normal_ = nullptr;
};

}  // namespace

// logits (S, V) with V as the head is packed.
API void decode_step(const Model* model, const Memory* memory, const Step* step, float* logits) {
    Decoding(*model, memory, *step).run(logits);
}
