// Rotary positions: out[d] = x[d] cos[d] + x[d +- P/2] sin[d], sin negated in its first half by whoever made it.
#include "pool.h"
#include "vec.h"

namespace {

struct Strides {
    long batch, head, token;  // the P numbers of a head lie together
};

struct Shape {
    long batch, heads, tokens, size;
};

// turn: 1, or -1 for the opposite direction, which is the backward pass.
template <class T>
void rotate(const Shape& s, const T* x, Strides in, const T* cos, const T* sin, long table_batch, long table_token,
            T* out, Strides to, float turn, int threads) {
    const long half = s.size / 2;
    const int useful = threads_for(threads, s.batch * s.heads * s.tokens * s.size);
    parallel(useful, s.batch * s.tokens, [&](long item, int) {
        long b = item / s.tokens, t = item % s.tokens;
        const T *c = cos + b * table_batch + t * table_token, *w = sin + b * table_batch + t * table_token;
        for (long h = 0; h < s.heads; h++) {
            const T* low = x + b * in.batch + h * in.head + t * in.token;
            T* o = out + b * to.batch + h * to.head + t * to.token;
            each_vec(half, [&](long i, auto n) {
                vec first = load(low + i, n), second = load(low + half + i, n);
                store(o + i, first * load(c + i, n) + second * load(w + i, n) * turn, n);
                store(o + half + i, second * load(c + half + i, n) + first * load(w + half + i, n) * turn, n);
            });
        }
    });
}

}  // namespace

// x and out (batch, heads, tokens, size), strides in numbers; cos and sin (batch, tokens, size) with theirs.
API void rotate_heads(int data, const void* x, long x_batch, long x_head, long x_token, const void* cos, const void* sin,
                      long table_batch, long table_token, void* out, long out_batch, long out_head, long out_token,
                      long batch, long heads, long tokens, long size, float turn, int threads) {
    Shape s{batch, heads, tokens, size};
    Strides in{x_batch, x_head, x_token}, to{out_batch, out_head, out_token};
    if (data)
        rotate(s, (const bf16*)x, in, (const bf16*)cos, (const bf16*)sin, table_batch, table_token, (bf16*)out, to,
               turn, threads);
    else
        rotate(s, (const float*)x, in, (const float*)cos, (const float*)sin, table_batch, table_token, (float*)out, to,
               turn, threads);
}
