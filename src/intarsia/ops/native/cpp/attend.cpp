// Keys are taken in stretches of a fixed length, a stretch for every KV head an item of work, and what the stretches
// found is put together in order: a query's numbers depend neither on its neighbours nor on the number of threads.
#include "attend.h"

#include <cmath>
#include <vector>

#include "pool.h"

namespace {

constexpr long STRETCH = 256;  // keys

#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;  // the processor multiplies pairs of bfloat16

inline __m512bh pairs_at(const bf16* p) { return as<__m512bh>(_mm512_loadu_si512(p)); }
inline vec dot(vec sums, __m512bh a, __m512bh b) { return as<vec>(_mm512_dpbf16_ps(as<__m512>(sums), a, b)); }
#else
constexpr bool PAIRS = false;
#endif

// What a query head found in one stretch: the largest score, the sum of exp(score - largest), and the values so weighted.
struct Found {
    float most, total;
};

struct Work {
    const Queries& a;
    const Pages &keys, &values;
    long stretches;      // most of any query
    Found* found;        // (S, H, stretches)
    float* partial;      // (S, H, stretches, P)

    long first(long s) const { return a.window && a.lengths[s] > a.window ? a.lengths[s] - a.window : 0; }

    // All query heads of KV head k over the keys of stretch i.
    void stretch(long s, long k, long i) const {
        const long begin = first(s) + i * STRETCH;
        const long count = a.lengths[s] - begin < STRETCH ? a.lengths[s] - begin : STRETCH;
        if (count <= 0) return;
        const long group = a.heads / a.kv_heads;
        const bool low = PAIRS && a.dim % 32 == 0;
        Room room{(char*)scratch(group * (STRETCH * 6 + a.dim * 2) + 3 * 64)};
        float* scores = room.take<float>(group * STRETCH);
        bf16 *weights = room.take<bf16>(group * STRETCH), *low_q = room.take<bf16>(group * a.dim);
        const int32_t* table = a.tables + s * a.table_row;
        const float* q = a.q + (s * a.heads + k * group) * a.dim;
        for (long p = 0; low && p < group * a.dim; p += W) store(low_q + p, load(q + p));
        float* to = partial + ((s * a.heads + k * group) * stretches + i) * a.dim;
        for (long g = 0; g < group; g += 4) {
            const Share part{table, begin, count, k, low, scores + g * STRETCH, weights + g * STRETCH};
            const float* in = q + g * a.dim;
            const bf16* low_in = low_q + g * a.dim;
            float* out = to + g * stretches * a.dim;
            Found* f = found + (s * a.heads + k * group + g) * stretches + i;
            switch (group - g) {
                case 1: heads<1>(part, in, low_in, out, f); break;
                case 2: heads<2>(part, in, low_in, out, f); break;
                case 3: heads<3>(part, in, low_in, out, f); break;
                default: heads<4>(part, in, low_in, out, f);
            }
        }
    }

    // A stretch for KV head k, and room for its scores. `low`: products of pairs of bfloat16.
    struct Share {
        const int32_t* table;
        long begin, count, k;
        bool low;
        float* scores;  // (G, STRETCH)
        bf16* weights;  // the same in bfloat16, where `low`
    };

    // G query heads that share a KV head.
    template <int G> void heads(const Share& s, const float* q, const bf16* low_q, float* out, Found* f) const {
        s.low ? score_low<G>(s, low_q) : score<G>(s, q);
        for (int g = 0; g < G; g++) f[g * stretches] = weigh(s.scores + g * STRETCH, s.count);
        if (s.low) return gather_low<G>(s, out);
        constexpr int SIDE = W == 16 ? 4 : 1;  // vectors of sums that find room in the registers beside each other
        long p = 0;
        for (; p + SIDE * W <= a.dim; p += SIDE * W) gather<G, SIDE>(s, p, Full{}, out + p);
        each_vec(a.dim - p, [&](long more, auto part) { gather<G, 1>(s, p + more, part, out + p + more); });
    }

    // The sums of W keys come out of their vectors together: one by one they would take longer than the products.
    template <int G> void score(const Share& s, const float* q) const {
        const float scale = 1.0f / std::sqrt(float(a.dim));
        vec all[G][W] = {};
        keys.each(s.table, a.size, s.begin, s.count, s.k, [&](long t, const bf16* key) {
            vec sums[G] = {};
            each_vec(a.dim, [&](long p, auto part) {
                const vec numbers = load(key + p, part);
                for (int g = 0; g < G; g++) sums[g] += load(q + g * a.dim + p, part) * numbers;
            });
            for (int g = 0; g < G; g++) all[g][t % W] = sums[g];
            if (t % W == W - 1 || t == s.count - 1)
                for (int g = 0; g < G; g++) store(s.scores + g * STRETCH + t / W * W, each_sum(all[g]) * scale);
        });
    }

    // Weighted values for G query heads, V vectors of their numbers from p on.
    template <int G, int V, class N> void gather(const Share& s, long p, N part, float* out) const {
        vec sums[G][V] = {};
        values.each(s.table, a.size, s.begin, s.count, s.k, [&](long t, const bf16* value) {
            vec weights[G];
            for (int g = 0; g < G; g++) weights[g] = broadcast(s.scores[g * STRETCH + t]);
            for (int v = 0; v < V; v++) {
                const vec numbers = load(value + p + v * W, part);
                for (int g = 0; g < G; g++) sums[g][v] += weights[g] * numbers;
            }
        });
        for (int g = 0; g < G; g++)
            for (int v = 0; v < V; v++) store(out + g * stretches * a.dim + v * W, sums[g][v], part);
    }

#if defined(__AVX512BF16__)
    // As `score`, of queries in bfloat16: keys are multiplied as they lie.
    template <int G> void score_low(const Share& s, const bf16* q) const {
        const float scale = 1.0f / std::sqrt(float(a.dim));
        vec all[G][W] = {};
        keys.each(s.table, a.size, s.begin, s.count, s.k, [&](long t, const bf16* key) {
            vec sums[G] = {};
            for (long p = 0; p < a.dim; p += 32) {
                const __m512bh numbers = pairs_at(key + p);
                for (int g = 0; g < G; g++) sums[g] = dot(sums[g], numbers, pairs_at(q + g * a.dim + p));
            }
            for (int g = 0; g < G; g++) all[g][t % W] = sums[g];
            if (t % W == W - 1 || t == s.count - 1)
                for (int g = 0; g < G; g++) store(s.scores + g * STRETCH + t / W * W, each_sum(all[g]) * scale);
        });
    }

    // As `gather`, of weights in bfloat16, two keys at a time: of each 32 numbers their values are laid side by side.
    template <int G> void gather_low(const Share& s, float* out) const {
        for (int g = 0; g < G; g++) {
            float* from = s.scores + g * STRETCH;
            for (long t = s.count; t % 2; t++) from[t] = 0;
            for (long t = 0; t < s.count; t += W) store(s.weights + g * STRETCH + t, load(from + t));
        }
        for (long p = 0; p < a.dim; p += 32) {
            vec left[G] = {}, right[G] = {};
            const bf16* before = nullptr;
            auto both = [&](long t, const bf16* one, const bf16* two) {
                const __m512i x = _mm512_loadu_si512(one + p), y = _mm512_loadu_si512(two + p);
                const __m512bh low = as<__m512bh>(_mm512_unpacklo_epi16(x, y));
                const __m512bh high = as<__m512bh>(_mm512_unpackhi_epi16(x, y));
                for (int g = 0; g < G; g++) {
                    int32_t pair;
                    memcpy(&pair, s.weights + g * STRETCH + t, sizeof pair);
                    const __m512bh weights = as<__m512bh>(_mm512_set1_epi32(pair));
                    left[g] = dot(left[g], low, weights), right[g] = dot(right[g], high, weights);
                }
            };
            values.each(s.table, a.size, s.begin, s.count, s.k, [&](long t, const bf16* value) {
                if (t % 2) both(t - 1, before, value);
                else if (t == s.count - 1) both(t, value, value);  // the second has no weight
                before = value;
            });
            const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
            const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
            for (int g = 0; g < G; g++) {
                const __m512 l = as<__m512>(left[g]), r = as<__m512>(right[g]);
                store(out + g * stretches * a.dim + p, as<vec>(_mm512_permutex2var_ps(l, first, r)));
                store(out + g * stretches * a.dim + p + W, as<vec>(_mm512_permutex2var_ps(l, second, r)));
            }
        }
    }
#else
    template <int G> void score_low(const Share&, const bf16*) const {}
    template <int G> void gather_low(const Share&, float*) const {}
#endif

    // scores -> exp(score - largest); behind them nothing.
    static Found weigh(float* scores, long count) {
        const long padded = (count + W - 1) / W * W;
        for (long t = count; t < padded; t++) scores[t] = -INFINITY;
        vec highest = load(scores);
        for (long t = W; t < padded; t += W) highest = larger(load(scores + t), highest);
        const float most = largest(highest);
        vec total{};
        for (long t = 0; t < padded; t += W) {
            const vec shifted = load(scores + t) - most;
            const vec weight = select(shifted < -87.0f, vec{}, exp(shifted));
            store(scores + t, weight);
            total += weight;
        }
        return {most, sum(total)};
    }

    // The stretches of one query head together.
    void join(long s, long h) const {
        const Found* f = found + (s * a.heads + h) * stretches;
        const float* from = partial + (s * a.heads + h) * stretches * a.dim;
        const long used = (a.lengths[s] - first(s) + STRETCH - 1) / STRETCH;
        float most = f[0].most, total = 0;
        for (long i = 1; i < used; i++) most = f[i].most > most ? f[i].most : most;
        for (long i = 0; i < used; i++) total += f[i].total * std::exp(f[i].most - most);
        float* to = a.out + (s * a.heads + h) * a.dim;
        for (long i = 0; i < used; i++) {
            const float share = std::exp(f[i].most - most) / total;
            each_vec(a.dim, [&](long p, auto part) {
                const vec before = i ? load(to + p, part) : vec{};
                store(to + p, before + share * load(from + i * a.dim + p, part), part);
            });
        }
    }
};

}  // namespace

void attend(const Queries& a, const Pages& keys, const Pages& values, int threads) {
    thread_local std::vector<float> partial;
    thread_local std::vector<Found> found;
    Work work{a, keys, values, 1, nullptr, nullptr};
    long numbers = 0;
    for (long s = 0; s < a.count; s++) {
        const long seen = a.lengths[s] - work.first(s), stretches = (seen + STRETCH - 1) / STRETCH;
        work.stretches = stretches > work.stretches ? stretches : work.stretches;
        numbers += seen * a.heads * a.dim;
    }
    partial.resize(a.count * a.heads * work.stretches * a.dim), found.resize(a.count * a.heads * work.stretches);
    work.partial = partial.data(), work.found = found.data();
    const long each = a.kv_heads * work.stretches;
    parallel(threads_for(threads, numbers), a.count * each, [&](long item, int) {
        work.stretch(item / each, item % each / work.stretches, item % work.stretches);
    });
    for (long s = 0; s < a.count; s++)
        for (long h = 0; h < a.heads; h++) work.join(s, h);
}

// q and out (S, H, P) float32.
API void paged_attention(const float* q, float* out, void* keys, void* values, const int32_t* tables, long table_row,
                         const int32_t* lengths, long page, long token, long head, long size, long count, long heads,
                         long kv_heads, long dim, long window, int threads) {
    const Pages k{(bf16*)keys, page, token, head}, v{(bf16*)values, page, token, head};
    attend({q, out, tables, lengths, table_row, size, count, heads, kv_heads, dim, window}, k, v, threads);
}
