// Causal attention of a stretch of tokens to themselves and to all before them, as in reading a prompt.
//
// Keys are taken in blocks that begin at fixed positions; the sums of a query go on from block to block, with the
// largest score so far taken out (FlashAttention-2, arXiv 2307.08691, 3.1). Nothing of size L x T is kept, and a query's
// numbers do not depend on which others are asked with it.
//
// Shape letters: B batch, H query heads, K KV heads, G query heads of a KV head, L queries, T keys, P head dim.
#include <cmath>
#include <initializer_list>

#include "pool.h"
#include "product.h"

namespace {

constexpr long KEYS = 128;       // of a block
constexpr long ROWS = 128;       // so many queries share a block of keys: some tokens, each with its G heads
constexpr float NEVER = -1e30f;  // the score of a key that a query does not see

struct Part {  // (B, heads, tokens, P), the numbers of a head together
    const bf16* data;
    long batch, head, token;
    const bf16* at(long b, long h, long t) const { return data + b * batch + h * head + t * token; }
};

struct Prompt {
    Part q, k, v;
    bf16* out;  // (B, L, H, P)
    long heads, kv_heads, length, total, dim, window;  // window: 0 for none

    long group() const { return heads / kv_heads; }
    long padded_dim() const { return (dim + 31) / 32 * 32; }
    long tokens() const { return group() < ROWS ? ROWS / group() : 1; }
    long rows() const { return (group() * tokens() + 31) / 32 * 32; }
};

// 2^x for x up to 0, to 3e-6; 0 below the normal numbers.
inline vec exp2(vec x) {
    const vec shifted = x + 12582912.0f, f = x - (shifted - 12582912.0f);
    vec p = f * 1.3333558e-3f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    return select(x < -126.0f, vec{}, as<vec>(as<uvec>(p) + (as<uvec>(shifted) << 23)));
}

template <class E> class Block {
    typedef typename E::low low;
    const Prompt& p;
    const long dim;
    low *q, *keys, *keys_right, *values_right, *weights;
    float *scores, *sums, *most, *total;

   public:
    explicit Block(const Prompt& p) : p(p), dim(p.padded_dim()) {
        const long rows = p.rows();
        Room room{(char*)scratch((rows + 3 * KEYS) * dim * sizeof(low) + rows * KEYS * (sizeof(low) + 4) +
                                 rows * (dim + 2) * 4 + 9 * 64)};
        q = room.take<low>(rows * dim), weights = room.take<low>(rows * KEYS);
        for (low** m : {&keys, &keys_right, &values_right}) *m = room.take<low>(KEYS * dim);
        scores = room.take<float>(rows * KEYS), sums = room.take<float>(rows * dim);
        most = room.take<float>(rows), total = room.take<float>(rows);
    }

    // The tokens from `first` on, of all query heads of KV head `head`.
    void run(long batch, long head, long first) {
        const long count = p.length - first < p.tokens() ? p.length - first : p.tokens();
        const long group = p.group(), rows = (group * count + 31) / 32 * 32;
        const long position = p.total - p.length + first;  // of the first token
        const long reach = p.window && position >= p.window ? position - p.window + 1 : 0;
        memset((void*)q, 0, rows * dim * sizeof(low)), memset(sums, 0, rows * dim * sizeof(float));
        for (long r = 0; r < rows; r++) most[r] = NEVER, total[r] = 0;
        for (long g = 0; g < group; g++)
            for (long i = 0; i < count; i++)
                convert(p.q.at(batch, head * group + g, first + i), q + (g * count + i) * dim, p.dim);
        for (long from = reach / KEYS * KEYS; from < position + count; from += KEYS) {
            const long width = set_keys(batch, head, from, position + count);
            E::product(rows, width, dim, q, dim, keys_right, width, scores, KEYS, false);
            for (long g = 0; g < group; g++)
                for (long i = 0; i < count; i++) {
                    const long last = position + i - from, row = g * count + i;
                    hide(scores + row * KEYS, p.window ? last - p.window + 1 : 0, last + 1, width);
                    weigh(row, width);
                }
            E::product(rows, dim, width, weights, KEYS, values_right, dim, sums, dim, true);
        }
        for (long g = 0; g < group; g++)
            for (long i = 0; i < count; i++) write(g * count + i, batch, first + i, head * group + g);
    }

   private:
    // Keys and values from position `from` to before `end`, as right operands; how many, with padding.
    long set_keys(long batch, long head, long from, long end) {
        const long count = end - from < KEYS ? end - from : KEYS, width = (count + 31) / 32 * 32;
        if (dim != p.dim || width != count) memset((void*)keys, 0, width * dim * sizeof(low));
        for (long t = 0; t < count; t++) convert(p.k.at(batch, head, from + t), keys + t * dim, p.dim);
        E::turn_right(keys, keys_right, width, dim);
        if (dim != p.dim || width != count) memset((void*)values_right, 0, width * dim * sizeof(low));
        for (long t = 0; t < count; t += 2) {
            const bf16 *even = p.v.at(batch, head, from + t), *odd = p.v.at(batch, head, from + t + 1);
            each_vec(p.dim, [&](long c, auto part) {
                E::put_pair(values_right, dim, t, c, load(even + c, part), t + 1 < count ? load(odd + c, part) : vec{});
            });
        }
        return width;
    }

    // Scores of a row outside of [begin, end).
    static void hide(float* row, long begin, long end, long width) {
        for (long t = 0; t < (begin < width ? begin : width); t++) row[t] = NEVER;
        for (long t = end > 0 ? end : 0; t < width; t++) row[t] = NEVER;
    }

    // Scores of a row -> weights, against the largest so far; the sums so far are scaled to it.
    void weigh(long row, long width) {
        const float scale = 1.44269504f / std::sqrt(float(p.dim));
        const float* score = scores + row * KEYS;
        vec high = load(score);
        for (long t = W; t < width; t += W) high = larger(high, load(score + t));
        const float before = most[row], here = largest(high);
        if (here > before) {
            most[row] = here;
            const vec fade = exp2(broadcast((before - here) * scale));
            total[row] *= fade[0];
            for (long c = 0; c < dim; c += W) store(sums + row * dim + c, load(sums + row * dim + c) * fade);
        }
        vec added{};
        const vec shift = broadcast(most[row] * scale);
        for (long t = 0; t < width; t += W) {
            const vec weight = exp2(load(score + t) * scale - shift);
            added += weight;
            store(weights + row * KEYS + t, weight);
        }
        total[row] += sum(added);
    }

    void write(long row, long batch, long token, long head) const {
        bf16* to = p.out + ((batch * p.length + token) * p.heads + head) * p.dim;
        const float share = 1.0f / total[row];
        each_vec(p.dim, [&](long c, auto part) { store(to + c, load(sums + row * dim + c) * share, part); });
    }
};

}  // namespace

// q (B, H, L, P), k and v (B, K, T, P) in any strides, the L queries being the last of T positions; out (B, L, H, P).
API void prompt_attention(const bf16* q, long q_batch, long q_head, long q_token, const bf16* k, long k_batch, long k_head,
                          long k_token, const bf16* v, long v_batch, long v_head, long v_token, bf16* out, long batch,
                          long heads, long kv_heads, long length, long total, long dim, long window, int threads) {
    const Prompt p{{q, q_batch, q_head, q_token}, {k, k_batch, k_head, k_token}, {v, v_batch, v_head, v_token}, out,
                   heads, kv_heads, length, total, dim, window};
    const long blocks = (length + p.tokens() - 1) / p.tokens();
    parallel(threads_for(threads, batch * heads * length * dim), batch * kv_heads * blocks, [&](long item, int) {
        LowReady ready;
        const long block = blocks - 1 - item / (batch * kv_heads), pair = item % (batch * kv_heads);  // the longest first
        Block<LowEngine>(p).run(pair / kv_heads, pair % kv_heads, block * p.tokens());
    });
}
