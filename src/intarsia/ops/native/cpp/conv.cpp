// Causal depthwise convolution with SiLU, forward, backward and one token, in one pass over memory.
// Shape letters: B batch, L length, C channels, K width.
#include <algorithm>
#include <type_traits>

#include "pool.h"
#include "vec.h"

namespace {

constexpr int TILE = 16;   // tokens that one pass over the channels computes
constexpr int BLOCK = 8;    // tiles of a task of the backward pass: sums do not depend on the number of threads
constexpr int AHEAD = 64;  // channels that are asked for before they are needed, for the pass jumps from row to row

struct Conv {
    const void *x, *state;    // (B, L, C); (B, K-1, C) or null
    long x_batch, x_row;      // strides; channels lie together
    const float* taps;        // (K + 1, C padded to 16): those of the oldest input first, at the end the bias
    const int32_t* segments;  // (B, L) or null
    long batch, length, channels;
    bool silu;

    long padded() const { return (channels + 15) / 16 * 16; }
};

// How many inputs before token t it sees; those before the first token are the state's.
int reach(const int32_t* ids, long t, long most) {
    int seen = 0;
    if (!ids) return int(most);
    while (seen < most && t - seen > 0 && ids[t - seen] == ids[t - seen - 1]) seen++;
    return t - seen > 0 ? seen : int(most);
}

template <class T, int K> struct Row {
    const Conv& a;
    const T *x, *state;
    const int32_t* ids;
    long x_row;

    Row(const Conv& a, long b)
        : a(a),
          x((const T*)a.x + b * a.x_batch),
          state(a.state ? (const T*)a.state + b * (K - 1) * a.channels : nullptr),
          ids(a.segments ? a.segments + b * a.length : nullptr),
          x_row(a.x_row) {}

    bool starts(long t) const { return ids && t > 0 && ids[t] != ids[t - 1]; }

    // Inputs t-K+1 .. t-1 at channel c as token t sees them, for the window before a tile; window[K - 1] is t's own.
    template <class N> void window_before(long t, long c, N n, vec* window) const {
        int seen = reach(ids, t, K - 1);
        for (int back = 1; back < K; back++) {
            long at = t - back;
            vec v{};
            if (back <= seen && at >= 0) v = load(x + at * x_row + c, n);
            else if (back <= seen && state) v = load(state + (at + K - 1) * a.channels + c, n);
            window[K - back] = v;  // one place to the right of where token t wants it: it shifts first
        }
    }

    template <class N> void shift_in(long t, long c, N n, vec* window) const {
        for (int k = 0; k + 1 < K; k++) window[k] = starts(t) ? vec{} : window[k + 1];
        window[K - 1] = load(x + t * x_row + c, n);
    }
};

template <class T, int K, class N>
void forward_tile(Row<T, K> row, T* y, long t0, long t1, long c, N n) {
    const long channels = row.a.channels, padded = row.a.padded();
    const bool silu = row.a.silu;
    vec window[K], tap[K], bias = load(row.a.taps + K * padded + c);
    for (int k = 0; k < K; k++) tap[k] = load(row.a.taps + k * padded + c);
    row.window_before(t0, c, n, window);
    for (long t = t0; t < t1; t++) {
        __builtin_prefetch(row.x + t * row.x_row + c + AHEAD);
        __builtin_prefetch(y + t * channels + c + AHEAD, 1);
        row.shift_in(t, c, n, window);
        vec u = bias;
        for (int k = 0; k < K; k++) u += tap[k] * window[k];
        store(y + t * channels + c, silu ? u * sigmoid(u) : u, n);
    }
}

template <class T, int K> void forward(const Conv& a, T* y, int threads) {
    long tiles = (a.length + TILE - 1) / TILE;
    threads = threads_for(threads, a.batch * a.length * a.channels);
    parallel(threads, a.batch * tiles, [&](long item, int) {
        Row<T, K> row(a, item / tiles);
        long t0 = item % tiles * TILE, t1 = t0 + TILE < a.length ? t0 + TILE : a.length;
        T* out = y + item / tiles * a.length * a.channels;
        each_vec(a.channels, [&](long c, auto n) { forward_tile<T, K>(row, out, t0, t1, c, n); });
    });
}

long blocks_of(long length) { return (length + BLOCK * TILE - 1) / (BLOCK * TILE); }

struct Gradients {
    void *x, *state;  // (B, L, C) and (B, K-1, C) or null, contiguous
    float* taps;      // (blocks, K + 1, padded C), a sum for every block of tiles
};

// Gradients of inputs t0 .. t1-1 at channels c: tokens t0 .. t1+K-2 have seen them. At t0 = 0 also those of the state.
template <class T, int K, class N>
void backward_tile(Row<T, K> row, const T* dy, T* dx, T* dstate, float* dw, long t0, long t1, long c, N n) {
    vec window[K], tap[K], dtap[K] = {}, dbias{}, pending[K] = {};  // pending[K-1-d]: the gradient of input t-d so far
    const long padded = row.a.padded();
    vec bias = load(row.a.taps + K * padded + c);
    for (int k = 0; k < K; k++) tap[k] = load(row.a.taps + k * padded + c);
    row.window_before(t0, c, n, window);
    long channels = row.a.channels, last = t1 + K - 1 < row.a.length ? t1 + K - 1 : row.a.length;
    int seen = reach(row.ids, t0, K - 1);
    auto finish = [&](long at, vec v) {
        if (at >= t0 && at < t1) store(dx + at * channels + c, v, n);
        else if (at < 0 && dstate) store(dstate + (at + K - 1) * channels + c, v, n);
    };
    for (long t = t0; t < last; t++) {
        __builtin_prefetch(row.x + t * row.x_row + c + AHEAD);
        __builtin_prefetch(dy + t * channels + c + AHEAD);
        __builtin_prefetch(dx + t * channels + c + AHEAD, 1);
        if (t > t0) seen = row.starts(t) ? 0 : seen < K - 1 ? seen + 1 : seen;
        row.shift_in(t, c, n, window);
        vec g = load(dy + t * channels + c, n);
        if (row.a.silu) {
            vec u = bias;
            for (int k = 0; k < K; k++) u += tap[k] * window[k];
            vec s = sigmoid(u);
            g *= s + u * s * (1.0f - s);
        }
        for (int k = 0; k + 1 < K; k++) pending[k] = pending[k + 1];
        pending[K - 1] = vec{};
        for (int k = 0; k < K; k++)
            if (K - 1 - k <= seen) pending[k] += tap[k] * g;
        if (t < t1) {
            dbias += g;
            for (int k = 0; k < K; k++) dtap[k] += g * window[k];
        }
        finish(t - K + 1, pending[0]);
    }
    for (int k = 1; k < K; k++) finish(last - K + k, pending[k]);
    for (int k = 0; k < K; k++) store(dw + k * padded + c, load(dw + k * padded + c) + dtap[k]);
    store(dw + K * padded + c, load(dw + K * padded + c) + dbias);
}

template <class T, int K> void backward(const Conv& a, const T* dy, const Gradients& d, int threads) {
    const long blocks = blocks_of(a.length);
    parallel(threads_for(threads, a.batch * a.length * a.channels), a.batch * blocks, [&](long item, int) {
        long b = item / blocks, first = item % blocks * BLOCK * TILE;
        Row<T, K> row(a, b);
        const T* g = dy + b * a.length * a.channels;
        T* dx = (T*)d.x + b * a.length * a.channels;
        float* dw = d.taps + item * (K + 1) * a.padded();
        for (long t0 = first; t0 < std::min(first + BLOCK * TILE, a.length); t0 += TILE) {
            T* dstate = d.state && t0 == 0 ? (T*)d.state + b * (K - 1) * a.channels : nullptr;
            each_vec(a.channels, [&](long c, auto n) {
                backward_tile<T, K>(row, g, dx, dstate, dw, t0, std::min(t0 + TILE, a.length), c, n);
            });
        }
    });
}

// One token: x and y (B, C); weight (C, K), as it is, and bias (C,) or null; state (B, K-1, C) moves on.
template <class T, class P, int K>
void step(const T* x, long x_batch, const P* weight, const P* bias, T* state, T* y, long batch, long channels,
          bool silu) {
    for (long b = 0; b < batch; b++) {
        const T* in = x + b * x_batch;
        T *held = state + b * (K - 1) * channels, *out = y + b * channels;
        each_vec(channels, [&](long c, auto n) {
            float tap[K][W] = {};
            for (int i = 0; i < W && c + i < channels; i++)
                for (int k = 0; k < K; k++) tap[k][i] = get(weight, (c + i) * K + k);
            vec u = bias ? load(bias + c, n) : vec{};
            for (int k = 0; k < K; k++) {
                vec seen = k + 1 < K ? load(held + k * channels + c, n) : load(in + c, n);
                u += load(tap[k]) * seen;
                if (k) store(held + (k - 1) * channels + c, seen, n);
            }
            store(out + c, silu ? u * sigmoid(u) : u, n);
        });
    }
}

// f with the width, 1 to 4, as a constant; 1 for one that is not there.
template <class F> int with_width(long width, F f) {
    switch (width) {
        case 1: return f(std::integral_constant<int, 1>()), 0;
        case 2: return f(std::integral_constant<int, 2>()), 0;
        case 3: return f(std::integral_constant<int, 3>()), 0;
        case 4: return f(std::integral_constant<int, 4>()), 0;
    }
    return 1;
}

}  // namespace

// Dtypes of data and of parameters: 0 float32, 1 bfloat16. All return 0, or 1 for a width that is not there.
API int conv_forward(int data, const void* x, long x_batch, long x_row, const float* taps, const void* state,
                     const int32_t* segments, void* y, long batch, long length, long channels, long width, int silu,
                     int threads) {
    Conv a{x, state, x_batch, x_row, taps, segments, batch, length, channels, silu != 0};
    return with_width(width, [&](auto k) {
        if (data) forward<bf16, k()>(a, (bf16*)y, threads);
        else forward<float, k()>(a, (float*)y, threads);
    });
}

// Sums of the taps' gradients that a backward pass wants room for.
API long conv_sums(long batch, long length) { return batch * blocks_of(length); }

// sums: (conv_sums, K + 1, C padded to 16), zeros.
API int conv_backward(int data, const void* x, long x_batch, long x_row, const float* taps, const void* state,
                      const int32_t* segments, const void* dy, void* dx, void* dstate, float* sums, long batch,
                      long length, long channels, long width, int silu, int threads) {
    Conv a{x, state, x_batch, x_row, taps, segments, batch, length, channels, silu != 0};
    Gradients d{dx, dstate, sums};
    return with_width(width, [&](auto k) {
        if (data) backward<bf16, k()>(a, (const bf16*)dy, d, threads);
        else backward<float, k()>(a, (const float*)dy, d, threads);
    });
}

API int conv_step(int data, int parameters, const void* x, long x_batch, const void* weight, const void* bias,
                  void* state, void* y, long batch, long channels, long width, int silu) {
    return with_width(width, [&](auto k) {
        auto run = [&](auto t, auto p) {
            typedef decltype(t) T;
            typedef decltype(p) P;
            step<T, P, k()>((const T*)x, x_batch, (const P*)weight, (const P*)bias, (T*)state, (T*)y, batch, channels,
                            silu != 0);
        };
        if (data) parameters ? run(bf16{}, bf16{}) : run(bf16{}, 0.0f);
        else parameters ? run(0.0f, bf16{}) : run(0.0f, 0.0f);
    });
}
