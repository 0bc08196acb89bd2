// The gated, grouped RMSNorm: out = weight * v / rms(v) over each group, v = y * silu(z); a row's group at a time.
#include <algorithm>
#include <cmath>

#include "pool.h"
#include "vec.h"

namespace {

constexpr long BLOCK = 64;  // rows of a task of the backward pass: sums over rows do not depend on the number of threads

struct Shape {
    long rows, channels, groups, y_row, z_row;  // strides of rows; channels lie together
    float eps;
    long size() const { return channels / groups; }
};

// v -> room, and 1 / rms(v).
template <class T> float gate(const T* y, const T* z, float* room, long size, float eps) {
    vec squares{};
    each_vec(size, [&](long c, auto n) {
        vec g = load(z + c, n), v = load(y + c, n) * (g * sigmoid(g));
        store(room + c, v, n);
        squares += v * v;
    });
    return 1.0f / std::sqrt(sum(squares) / float(size) + eps);
}

template <class T>
void forward(const Shape& s, const T* y, const T* z, const float* weight, T* out, int threads) {
    long size = s.size();
    parallel(threads_for(threads, s.rows * s.channels), s.rows, [&](long row, int) {
        float* v = (float*)scratch(size * sizeof(float));
        for (long first = 0; first < s.channels; first += size) {
            float scale = gate(y + row * s.y_row + first, z + row * s.z_row + first, v, size, s.eps);
            T* to = out + row * s.channels + first;
            each_vec(size, [&](long c, auto n) { store(to + c, load(v + c, n) * scale * load(weight + first + c, n), n); });
        }
    });
}

template <class T>
void backward_group(const T* y, const T* z, const float* weight, const T* dout, T* dy, T* dz, float* dweight, float* v,
                    long size, float eps) {
    float scale = gate(y, z, v, size, eps);
    vec along{};  // the part of the gradient along v, which the norm takes away
    each_vec(size, [&](long c, auto n) {
        vec unit = load(v + c, n) * scale, g = load(dout + c, n);
        store(v + c, unit, n);
        store(dweight + c, load(dweight + c, n) + g * unit, n);
        along += g * load(weight + c, n) * unit;
    });
    float mean = sum(along) / float(size);
    each_vec(size, [&](long c, auto n) {
        vec dv = (load(dout + c, n) * load(weight + c, n) - load(v + c, n) * mean) * scale;
        vec g = load(z + c, n), s = sigmoid(g);
        store(dy + c, dv * (g * s), n);
        store(dz + c, dv * load(y + c, n) * (s + g * s * (1.0f - s)), n);
    });
}

template <class T>
void backward(const Shape& s, const T* y, const T* z, const float* weight, const T* dout, T* dy, T* dz, float* dweight,
              int threads) {
    long size = s.size();
    parallel(threads_for(threads, s.rows * s.channels), (s.rows + BLOCK - 1) / BLOCK, [&](long block, int) {
        float* v = (float*)scratch(size * sizeof(float));
        for (long row = block * BLOCK; row < std::min(s.rows, (block + 1) * BLOCK); row++)
            for (long first = 0; first < s.channels; first += size) {
                long at = row * s.channels + first;
                backward_group(y + row * s.y_row + first, z + row * s.z_row + first, weight + first, dout + at, dy + at,
                               dz + at, dweight + block * s.channels + first, v, size, s.eps);
            }
    });
}

}  // namespace

// data: the dtype of y, z and out, 0 float32 and 1 bfloat16.
API void gated_norm_forward(int data, const void* y, long y_row, const void* z, long z_row, const float* weight,
                            void* out, long rows, long channels, long groups, float eps, int threads) {
    Shape s{rows, channels, groups, y_row, z_row, eps};
    if (data) forward(s, (const bf16*)y, (const bf16*)z, weight, (bf16*)out, threads);
    else forward(s, (const float*)y, (const float*)z, weight, (float*)out, threads);
}

// Sums of dweight that a backward pass wants room for.
API long gated_norm_sums(long rows) { return (rows + BLOCK - 1) / BLOCK; }

// dout, dy, dz (rows, channels) contiguous; dweight (gated_norm_sums, channels) zeros.
API void gated_norm_backward(int data, const void* y, long y_row, const void* z, long z_row, const float* weight,
                             const void* dout, void* dy, void* dz, float* dweight, long rows, long channels,
                             long groups, float eps, int threads) {
    Shape s{rows, channels, groups, y_row, z_row, eps};
    if (data)
        backward(s, (const bf16*)y, (const bf16*)z, weight, (const bf16*)dout, (bf16*)dy, (bf16*)dz, dweight, threads);
    else
        backward(s, (const float*)y, (const float*)z, weight, (const float*)dout, (float*)dy, (float*)dz, dweight,
                 threads);
}
