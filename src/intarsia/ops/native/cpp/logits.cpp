// Reductions of logits row by row, and their gradients in place: a row is read from memory once.
#include <cmath>

#include "pool.h"
#include "vec.h"

namespace {

template <class T> float row_maximum(const T* x, long count) {
    vec most = broadcast(get(x, 0));
    long i = 0;
    for (; i + W <= count; i += W) most = larger(load(x + i), most);
    float top = largest(most);
    for (; i < count; i++)
        if (get(x, i) > top) top = get(x, i);
    return top;
}

// What lies behind the end of a row: so small that its exponential is nothing.
inline vec within(vec v, Full) { return v; }
inline vec within(vec v, Part part) {
    float t[W];
    store(t, v);
    for (long i = part.n; i < W; i++) t[i] = 0;
    return load(t);
}

// exp(x - top) into `to`; returns their sum.
template <class T> float exponentials(const T* x, float top, float* to, long count) {
    vec total{};
    each_vec(count, [&](long i, auto n) {
        vec e = exp(load(x + i, n) - top);
        store(to + i, e, n);
        total += within(e, n);
    });
    return sum(total);
}

struct Kl {
    float nats;
    bool same;  // both have their maximum in one place
};

// One row; dq, which may be q itself, or null, receives softmax(q) - softmax(p).
template <class T> Kl kl_row(const T* p, const T* q, T* dq, float* room, long count) {
    float *ep = room, *eq = room + count;
    float p_top = row_maximum(p, count), q_top = row_maximum(q, count);
    float p_sum = exponentials(p, p_top, ep, count), q_sum = exponentials(q, q_top, eq, count);
    vec apart{};
    ivec same{};
    each_vec(count, [&](long i, auto n) {
        vec a = load(p + i, n) - p_top, b = load(q + i, n) - q_top;
        apart += within(load(ep + i, n) * (a - b), n);
        same |= as<ivec>(within(as<vec>((a == 0.0f) & (b == 0.0f)), n));
    });
    if (dq) {
        float p_scale = 1.0f / p_sum, q_scale = 1.0f / q_sum;
        each_vec(count, [&](long i, auto n) { store(dq + i, load(eq + i, n) * q_scale - load(ep + i, n) * p_scale, n); });
    }
    bool any = false;
    for (int i = 0; i < W; i++) any |= same[i] != 0;
    return {sum(apart) / p_sum - std::log(p_sum) + std::log(q_sum), any};
}

template <class T>
void kl(const T* p, const T* q, T* dq, float* nats, uint8_t* same, long rows, long count, int threads) {
    parallel(threads_for(threads, rows * count), rows, [&](long row, int) {
        float* room = (float*)scratch(2 * count * sizeof(float));
        long at = row * count;
        Kl found = kl_row(p + at, q + at, dq ? dq + at : nullptr, room, count);
        nats[row] = found.nats, same[row] = found.same;
    });
}

template <class T>
void nll(const T* x, const int64_t* targets, T* dx, float* nats, uint8_t* hits, long rows, long count, int threads) {
    parallel(threads_for(threads, rows * count), rows, [&](long row, int) {
        float* e = (float*)scratch(count * sizeof(float));
        const T* logits = x + row * count;
        float top = row_maximum(logits, count), total = exponentials(logits, top, e, count);
        long target = targets[row];
        float chosen = get(logits, target) - top;
        nats[row] = std::log(total) - chosen, hits[row] = chosen == 0.0f;
        if (!dx) return;
        T* to = dx + row * count;
        float scale = 1.0f / total;
        each_vec(count, [&](long i, auto n) { store(to + i, load(e + i, n) * scale, n); });
        put(to + target, e[target] * scale - 1.0f);
    });
}

}  // namespace

// p, q (rows, count) in the dtype `data`, 0 float32 and 1 bfloat16; dq null or of their kind, q itself if you like.
API void kl_rows(int data, const void* p, const void* q, void* dq, float* nats, uint8_t* same, long rows, long count,
                 int threads) {
    if (data) kl((const bf16*)p, (const bf16*)q, (bf16*)dq, nats, same, rows, count, threads);
    else kl((const float*)p, (const float*)q, (float*)dq, nats, same, rows, count, threads);
}

// -log softmax(x)[target], whether the target is the largest, and softmax(x) - onehot(target) into dx or nowhere.
API void nll_rows(int data, const void* x, const int64_t* targets, void* dx, float* nats, uint8_t* hits, long rows,
                  long count, int threads) {
    if (data) nll((const bf16*)x, targets, (bf16*)dx, nats, hits, rows, count, threads);
    else nll((const float*)x, targets, (float*)dx, nats, hits, rows, count, threads);
}
