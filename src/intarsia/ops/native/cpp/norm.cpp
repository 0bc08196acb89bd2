// RMSNorm: out = weight * x / rms(x) over the last dimension, and its backward from what the forward pass kept: 1 / rms.
#include <algorithm>
#include <cmath>

#include "pool.h"
#include "vec.h"

namespace {

constexpr long BLOCK = 64;  // rows of one task: sums over rows are the same whatever the number of threads

struct Shape {
    long rows, x_row, channels;  // x_row: from one row of x to the next; channels lie together
    int threads;
};

template <class F> void each_block(const Shape& s, F f) {
    parallel(threads_for(s.threads, s.rows * s.channels), (s.rows + BLOCK - 1) / BLOCK, [&](long block, int) {
        f(block, block * BLOCK, std::min(s.rows, (block + 1) * BLOCK));
    });
}

template <class T> void forward(const Shape& s, const T* x, const T* weight, T* out, float* scales, float eps) {
    each_block(s, [&](long, long first, long last) {
        for (long row = first; row < last; row++) {
            const T* from = x + row * s.x_row;
            T* to = out + row * s.channels;
            vec squares{};
            each_vec(s.channels, [&](long c, auto n) {
                vec v = load(from + c, n);
                squares += v * v;
            });
            float scale = 1.0f / std::sqrt(sum(squares) / float(s.channels) + eps);
            if (scales) scales[row] = scale;
            each_vec(s.channels, [&](long c, auto n) { store(to + c, load(from + c, n) * scale * load(weight + c, n), n); });
        }
    });
}

template <class T>
void backward_row(const T* x, const T* weight, float scale, const T* dout, T* dx, float* dweight, long channels) {
    vec along{};  // the part of the gradient along x, which the norm takes away
    each_vec(channels, [&](long c, auto n) {
        vec g = load(dout + c, n), unit = load(x + c, n) * scale;
        if (dweight) store(dweight + c, load(dweight + c, n) + g * unit, n);
        along += g * load(weight + c, n) * unit;
    });
    float mean = sum(along) / float(channels);
    each_vec(channels, [&](long c, auto n) {
        vec unit = load(x + c, n) * scale;
        store(dx + c, (load(dout + c, n) * load(weight + c, n) - unit * mean) * scale, n);
    });
}

template <class T>
void backward(const Shape& s, const T* x, const T* weight, const float* scales, const T* dout, T* dx, float* dweight) {
    each_block(s, [&](long block, long first, long last) {
        float* sums = dweight ? dweight + block * s.channels : nullptr;
        for (long row = first; row < last; row++)
            backward_row(x + row * s.x_row, weight, scales[row], dout + row * s.channels, dx + row * s.channels, sums,
                         s.channels);
    });
}

}  // namespace

// data: the dtype of x, weight and out, 0 float32 and 1 bfloat16; scales (rows) or null receives 1 / rms.
API void rms_norm_forward(int data, const void* x, long x_row, const void* weight, void* out, float* scales, long rows,
                          long channels, float eps, int threads) {
    Shape s{rows, x_row, channels, threads};
    if (data) forward(s, (const bf16*)x, (const bf16*)weight, (bf16*)out, scales, eps);
    else forward(s, (const float*)x, (const float*)weight, (float*)out, scales, eps);
}

// Sums of dweight that a backward pass wants room for.
API long rms_norm_sums(long rows) { return (rows + BLOCK - 1) / BLOCK; }

// dout and dx (rows, channels) contiguous; dweight (rms_norm_sums, channels) zeros, or null.
API void rms_norm_backward(int data, const void* x, long x_row, const void* weight, const float* scales,
                           const void* dout, void* dx, float* dweight, long rows, long channels, int threads) {
    Shape s{rows, x_row, channels, threads};
    if (data) backward(s, (const bf16*)x, (const bf16*)weight, scales, (const bf16*)dout, (bf16*)dx, dweight);
    else backward(s, (const float*)x, (const float*)weight, scales, (const float*)dout, (float*)dx, dweight);
}
