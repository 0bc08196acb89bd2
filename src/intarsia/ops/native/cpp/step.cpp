// One token of Mamba-2's scan: S <- exp(dt A) S + dt x B^T, y = S C + D x, each state read and written once.
// Shape letters: B batch, H heads, P head dim, G groups, N state.
#include "pool.h"
#include "vec.h"

namespace {

template <class T>
void step_head(const T* x, float dt, float a, const T* b, const T* c, float d, float* state, T* y, long size,
               long width) {
    const long padded = (width + W - 1) / W * W;
    float *gain = (float*)scratch(2 * padded * sizeof(float)), *read = gain + padded;
    each_vec(width, [&](long n, auto part) {
        store(gain + n, load(b + n, part) * dt);
        store(read + n, load(c + n, part));
    });
    const vec decay = exp(broadcast(dt * a));
    const float left = dt * a < -87.0f ? 0.0f : decay[0];
    for (long p = 0; p < size; p++, state += width) {
        const float in = get(x, p);
        vec out{};
        each_vec(width, [&](long n, auto part) {
            vec s = load(state + n, part) * left + in * load(gain + n);
            store(state + n, s, part);
            out += s * load(read + n);
        });
        put(y + p, sum(out) + d * in);
    }
}

template <class T>
void step(const T* x, long x_batch, const float* dt, const float* a, const T* b, long b_batch, const T* c, long c_batch,
          const float* d, float* state, T* y, long batch, long heads, long size, long groups, long width,
          int threads) {
    threads = threads_for(threads, batch * heads * size * width);
    parallel(threads, batch * heads, [&](long item, int) {
        long row = item / heads, h = item % heads, group = h / (heads / groups);
        step_head(x + row * x_batch + h * size, dt[item], a[h], b + row * b_batch + group * width,
                  c + row * c_batch + group * width, d ? d[h] : 0.0f, state + item * size * width, y + item * size, size,
                  width);
    });
}

}  // namespace

// data: the dtype of x, b, c and y, 0 float32 and 1 bfloat16. dt (B, H), state (B, H, P, N), y (B, H, P) contiguous.
API void ssd_step(int data, const void* x, long x_batch, const float* dt, const float* a, const void* b, long b_batch,
                  const void* c, long c_batch, const float* d, float* state, void* y, long batch, long heads, long size,
                  long groups, long width, int threads) {
    auto run = [&](auto t) {
        typedef decltype(t) T;
        step((const T*)x, x_batch, dt, a, (const T*)b, b_batch, (const T*)c, c_batch, d, state, (T*)y, batch, heads,
             size, groups, width, threads);
    };
    data ? run(bf16{}) : run(0.0f);
}
