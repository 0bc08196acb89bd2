// The FFN's activations, number by number: silu(gate) * up, and the square of what is positive.
#include <algorithm>

#include "pool.h"
#include "vec.h"

namespace {

constexpr long BLOCK = 8192;  // numbers of one task

// f(i, Full or Part) for every vector of `count` numbers, on several threads.
template <class F> void everywhere(long count, int threads, F f) {
    parallel(threads_for(threads, count), (count + BLOCK - 1) / BLOCK, [&](long block, int) {
        long first = block * BLOCK;
        each_vec(std::min(BLOCK, count - first), [&](long i, auto n) { f(first + i, n); });
    });
}

template <class T> void silu_mul(const T* gate, const T* up, T* out, long count, int threads) {
    everywhere(count, threads, [&](long i, auto n) {
        vec g = load(gate + i, n);
        store(out + i, g * sigmoid(g) * load(up + i, n), n);
    });
}

template <class T>
void silu_mul_back(const T* gate, const T* up, const T* dout, T* dgate, T* dup, long count, int threads) {
    everywhere(count, threads, [&](long i, auto n) {
        vec g = load(gate + i, n), s = sigmoid(g), d = load(dout + i, n);
        store(dup + i, d * (g * s), n);
        store(dgate + i, d * load(up + i, n) * (s + g * s * (1.0f - s)), n);
    });
}

vec positive(vec x) { return select(x < vec{}, vec{}, x); }  // a NaN stays one

template <class T> void relu_squared(const T* x, T* out, long count, int threads) {
    everywhere(count, threads, [&](long i, auto n) {
        vec v = positive(load(x + i, n));
        store(out + i, v * v, n);
    });
}

template <class T> void relu_squared_back(const T* x, const T* dout, T* dx, long count, int threads) {
    everywhere(count, threads, [&](long i, auto n) { store(dx + i, 2.0f * positive(load(x + i, n)) * load(dout + i, n), n); });
}

}  // namespace

// Everywhere data is the dtype of all tensors, 0 float32 and 1 bfloat16, and all of them are contiguous.
API void silu_mul_forward(int data, const void* gate, const void* up, void* out, long count, int threads) {
    if (data) silu_mul((const bf16*)gate, (const bf16*)up, (bf16*)out, count, threads);
    else silu_mul((const float*)gate, (const float*)up, (float*)out, count, threads);
}

API void silu_mul_backward(int data, const void* gate, const void* up, const void* dout, void* dgate, void* dup,
                           long count, int threads) {
    if (data)
        silu_mul_back((const bf16*)gate, (const bf16*)up, (const bf16*)dout, (bf16*)dgate, (bf16*)dup, count, threads);
    else
        silu_mul_back((const float*)gate, (const float*)up, (const float*)dout, (float*)dgate, (float*)dup, count,
                      threads);
}

API void relu_squared_forward(int data, const void* x, void* out, long count, int threads) {
    if (data) relu_squared((const bf16*)x, (bf16*)out, count, threads);
    else relu_squared((const float*)x, (float*)out, count, threads);
}

API void relu_squared_backward(int data, const void* x, const void* dout, void* dx, long count, int threads) {
    if (data) relu_squared_back((const bf16*)x, (const bf16*)dout, (bf16*)dx, count, threads);
    else relu_squared_back((const float*)x, (const float*)dout, (float*)dx, count, threads);
}
