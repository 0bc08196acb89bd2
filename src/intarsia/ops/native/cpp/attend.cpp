// Keys are taken in stretches of a fixed length, a stretch for every KV head an item of work, and what the stretches
// found is put together in order: a query's numbers depend neither on its neighbours nor on the number of threads.
#include "attend.h"

#include <cmath>
#include <vector>

#include "pool.h"

namespace {

constexpr long STRETCH = 256;  // keys

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
        const long group = a.heads / a.kv_heads, padded = (count + W - 1) / W * W;
        float* scores = (float*)scratch(group * STRETCH * sizeof(float));
        const int32_t* table = a.tables + s * a.table_row;
        const float* q = a.q + (s * a.heads + k * group) * a.dim;
        const float scale = 1.0f / std::sqrt(float(a.dim));
        keys.each(table, a.size, begin, count, k, [&](long t, const bf16* key) {
            for (long g = 0; g < group; g++) {
                vec all{};
                each_vec(a.dim, [&](long p, auto part) { all += load(q + g * a.dim + p, part) * load(key + p, part); });
                scores[g * STRETCH + t] = sum(all) * scale;
            }
        });
        for (long g = 0; g < group; g++)
            found[(s * a.heads + k * group + g) * stretches + i] = weigh(scores + g * STRETCH, count, padded);
        float* to = partial + ((s * a.heads + k * group) * stretches + i) * a.dim;
        for (long g = 0; g < group; g += 4) {
            const float* weights = scores + g * STRETCH;
            float* out = to + g * stretches * a.dim;
            switch (group - g) {
                case 1: gather<1>(table, begin, count, k, weights, out); break;
                case 2: gather<2>(table, begin, count, k, weights, out); break;
                case 3: gather<3>(table, begin, count, k, weights, out); break;
                default: gather<4>(table, begin, count, k, weights, out);
            }
        }
    }

    // Weighted values for G query heads, a vector of their numbers at a time.
    template <int G>
    void gather(const int32_t* table, long begin, long count, long k, const float* weights, float* out) const {
        each_vec(a.dim, [&](long p, auto part) {
            vec sums[G] = {};
            values.each(table, a.size, begin, count, k, [&](long t, const bf16* value) {
                const vec numbers = load(value + p, part);
                for (int g = 0; g < G; g++) sums[g] += weights[g * STRETCH + t] * numbers;
            });
            for (int g = 0; g < G; g++) store(out + g * stretches * a.dim + p, sums[g], part);
        });
    }

    // scores -> exp(score - largest)
    static Found weigh(float* scores, long count, long padded) {
        float most = scores[0];
        for (long t = 1; t < count; t++) most = scores[t] > most ? scores[t] : most;
        for (long t = count; t < padded; t++) scores[t] = -INFINITY;
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
