// Mamba-1's selective scan: forward, backward and one token (arXiv 2312.00752, section 3).
// Shape letters: B batch, L length, E channels, N state. A lane is a channel, so that outputs are sums over registers.
#include <algorithm>

#include "pool.h"
#include "vec.h"

namespace {

constexpr int CHUNK = 32;       // tokens between two kept states; those of a vector of channels stay in the cache
constexpr int GROUP = 64 / W;  // vectors of channels of a task: 64 channels, two lines of bfloat16

long chunks_of(long length) { return (length + CHUNK - 1) / CHUNK; }
long groups_of(long channels) { return (channels + GROUP * W - 1) / (GROUP * W); }

struct Scan {
    const void* x;             // (B, L, E)
    const float *dt, *A;       // (B, L, E) and (N, E)
    const float *B, *C, *D;    // (B, L, N) twice, (E) or null
    const int32_t* segments;   // (B, L) or null
    long batch, length, channels, width;

    bool begins(long row, long t) const { return segments && t > 0 && segments[row] != segments[row - 1]; }
    long groups() const { return groups_of(channels); }
    long chunks() const { return chunks_of(length); }
    int worth(int threads) const { return threads_for(threads, batch * length * channels * width); }
};

// One task: the channels [first, first + count) of a row of the batch, chunk by chunk.
struct Stretch {
    long b, first, count;
    Stretch(const Scan& a, long item)
        : b(item / a.groups()),
          first(item % a.groups() * GROUP * W),
          count(std::min(long(GROUP) * W, a.channels - first)) {}
};

void copy_rows(const float* from, float* to, const Scan& a, const Stretch& part) {
    for (long n = 0; n < a.width; n++)
        std::copy_n(from + n * a.channels + part.first, part.count, to + n * a.channels + part.first);
}

// Tokens t0 .. t1-1 of row b at channels c; state (N, E) moves on.
template <class T, class K>
void forward_chunk(const Scan& a, T* y, float* state, vec* S, long b, long t0, long t1, long c, K k) {
    const long E = a.channels, N = a.width;
    vec *A = S + N, D = a.D ? load(a.D + c, k) : vec{};
    for (long n = 0; n < N; n++) S[n] = load(state + n * E + c, k), A[n] = load(a.A + n * E + c, k);
    for (long t = t0; t < t1; t++) {
        const long row = b * a.length + t;
        if (a.begins(row, t)) std::fill_n(S, N, vec{});
        const vec dt = load(a.dt + row * E + c, k), x = load((const T*)a.x + row * E + c, k), u = dt * x;
        const float *B = a.B + row * N, *C = a.C + row * N;
        vec out = D * x;
        for (long n = 0; n < N; n++) {
            S[n] = exp(dt * A[n]) * S[n] + u * B[n];
            out += S[n] * C[n];
        }
        store(y + row * E + c, out, k);
    }
    for (long n = 0; n < N; n++) store(state + n * E + c, S[n], k);
}

// last (B, N, E): the state before, then the one behind; kept (chunks, B, N, E) or null: those before every chunk.
template <class T> void forward(const Scan& a, T* y, float* last, float* kept, int threads) {
    const long size = a.width * a.channels;
    parallel(a.worth(threads), a.batch * a.groups(), [&](long item, int) {
        const Stretch part(a, item);
        vec* S = (vec*)scratch(2 * a.width * sizeof(vec));
        float* state = last + part.b * size;
        for (long chunk = 0; chunk < a.chunks(); chunk++) {
            const long t0 = chunk * CHUNK, t1 = std::min(t0 + CHUNK, a.length);
            if (kept) copy_rows(state, kept + (chunk * a.batch + part.b) * size, a, part);
            each_vec(part.count, [&](long c, auto k) {
                forward_chunk(a, y, state, S, part.b, t0, t1, part.first + c, k);
            });
        }
    });
}

struct Gradients {
    void* x;              // (B, L, E)
    float *dt, *A, *D;    // (B, L, E), (B, N, E), (B, E): the last two a row of the batch
    float *B, *C;         // (groups, B, L, N): a sum for every group of channels
    float* state;         // (B, N, E): of the state behind, then of the one before
};

// What the backward pass of one vector of channels over one chunk needs at hand.
struct Memory {
    vec *states, *decays, *B, *C, *flow, *A;  // (CHUNK + 1, N), (CHUNK, N) three times, (N) twice

    static size_t bytes(long N) { return ((4 * CHUNK + 3) * N * sizeof(vec)) + 6 * 64; }
    explicit Memory(long N) {
        Room room{(char*)scratch(bytes(N))};
        states = room.take<vec>((CHUNK + 1) * N), decays = room.take<vec>(CHUNK * N);
        B = room.take<vec>(CHUNK * N), C = room.take<vec>(CHUNK * N);
        flow = room.take<vec>(N), A = room.take<vec>(N);
    }
};

// The states of tokens t0 .. t1-1 and the decays into them, again, from the state before (N, E).
template <class T, class K>
void states_again(const Scan& a, const float* before, const Memory& m, long b, long t0, long t1, long c, K k) {
    const long E = a.channels, N = a.width;
    for (long n = 0; n < N; n++) m.states[n] = load(before + n * E + c, k);
    for (long t = t0; t < t1; t++) {
        const long row = b * a.length + t;
        const vec dt = load(a.dt + row * E + c, k), u = dt * load((const T*)a.x + row * E + c, k);
        const vec* S = m.states + (t - t0) * N;
        vec *next = m.states + (t - t0 + 1) * N, *decay = m.decays + (t - t0) * N;
        const bool begins = a.begins(row, t);
        for (long n = 0; n < N; n++) {
            decay[n] = begins ? vec{} : exp(dt * m.A[n]);
            next[n] = decay[n] * S[n] + u * a.B[row * N + n];
        }
    }
}

template <class T, class K>
void backward_chunk(const Scan& a, const T* dy, const float* before, const Gradients& d, const Memory& m, long b,
                    long t0, long t1, long c, K k) {
    const long E = a.channels, N = a.width;
    float *dstate = d.state + b * N * E + c, *dA = d.A + b * N * E + c;
    for (long n = 0; n < N; n++) m.A[n] = load(a.A + n * E + c, k), m.flow[n] = load(dstate + n * E, k);
    states_again<T>(a, before, m, b, t0, t1, c, k);
    vec D = a.D ? load(a.D + c, k) : vec{}, dD{};
    for (long t = t1 - 1; t >= t0; t--) {
        const long row = b * a.length + t, i = (t - t0) * N;
        const vec g = load(dy + row * E + c, k), dt = load(a.dt + row * E + c, k);
        const vec x = load((const T*)a.x + row * E + c, k), u = dt * x;
        vec du{}, dstep{};
        for (long n = 0; n < N; n++) {
            const vec flow = m.flow[n] + g * a.C[row * N + n];  // the gradient of the token's state
            m.C[i + n] += g * m.states[i + N + n];
            m.B[i + n] += u * flow;
            du += flow * a.B[row * N + n];
            m.flow[n] = flow * m.decays[i + n];
            const vec exponent = m.flow[n] * m.states[i + n];
            dstep += exponent * m.A[n];
            store(dA + n * E, load(dA + n * E, k) + exponent * dt, k);
        }
        store((T*)d.x + row * E + c, du * dt + D * g, k);
        store(d.dt + row * E + c, du * x + dstep, k);
        dD += g * x;
    }
    for (long n = 0; n < N; n++) store(dstate + n * E, m.flow[n], k);
    if (d.D) store(d.D + b * E + c, load(d.D + b * E + c, k) + dD, k);
}

// Sums over lanes of `count` vectors.
void sum_lanes(vec* v, long count, float* to) {
    each_vec(count, [&](long i, auto k) { store(to + i, each_sum(v + i), k); });
}

template <class T> void backward(const Scan& a, const T* dy, const float* kept, const Gradients& d, int threads) {
    const long size = a.width * a.channels, tokens = a.batch * a.length;
    parallel(a.worth(threads), a.batch * a.groups(), [&](long item, int) {
        const Stretch part(a, item);
        const Memory m(a.width);
        const long group = part.first / (GROUP * W);
        for (long chunk = a.chunks() - 1; chunk >= 0; chunk--) {
            const long t0 = chunk * CHUNK, t1 = std::min(t0 + CHUNK, a.length);
            std::fill_n(m.B, CHUNK * a.width, vec{});
            std::fill_n(m.C, CHUNK * a.width, vec{});
            const float* before = kept + (chunk * a.batch + part.b) * size;
            each_vec(part.count, [&](long c, auto k) {
                backward_chunk<T>(a, dy, before, d, m, part.b, t0, t1, part.first + c, k);
            });
            const long at = (group * tokens + part.b * a.length + t0) * a.width;
            sum_lanes(m.B, (t1 - t0) * a.width, d.B + at);
            sum_lanes(m.C, (t1 - t0) * a.width, d.C + at);
        }
    });
}

// One token of row b: here a lane is a number of the state, as it lies in memory. state (E, N) moves on.
template <class T>
void step(const T* x, const float* dt, const float* A, const float* B, const float* C, const float* D, float* state,
          T* y, long channels, long N) {
    for (long e = 0; e < channels; e++) {
        const float in = get(x, e), u = dt[e] * in;
        float* S = state + e * N;
        vec out{};
        each_vec(N, [&](long n, auto k) {
            const vec s = exp(dt[e] * load(A + e * N + n, k)) * load(S + n, k) + u * load(B + n, k);
            store(S + n, s, k);
            out += s * load(C + n, k);
        });
        put(y + e, sum(out) + (D ? D[e] * in : 0.0f));
    }
}

}  // namespace

// Data: 0 float32, 1 bfloat16, of x, y and their gradients.
API void selective_forward(int data, const void* x, const float* dt, const float* A, const float* B, const float* C,
                           const float* D, const int32_t* segments, void* y, float* last, float* kept, long batch,
                           long length, long channels, long width, int threads) {
    const Scan a{x, dt, A, B, C, D, segments, batch, length, channels, width};
    if (data) forward(a, (bf16*)y, last, kept, threads);
    else forward(a, (float*)y, last, kept, threads);
}

API long selective_chunks(long length) { return chunks_of(length); }
API long selective_groups(long channels) { return groups_of(channels); }

// dA (B, N, E) and dD (B, E) are zeros before; dB and dC (groups, B, L, N); dstate (B, N, E).
API void selective_backward(int data, const void* x, const float* dt, const float* A, const float* B, const float* C,
                            const float* D, const int32_t* segments, const void* dy, const float* kept, void* dx,
                            float* ddt, float* dA, float* dB, float* dC, float* dD, float* dstate, long batch,
                            long length, long channels, long width, int threads) {
    const Scan a{x, dt, A, B, C, D, segments, batch, length, channels, width};
    const Gradients d{dx, ddt, dA, dD, dB, dC, dstate};
    if (data) backward(a, (const bf16*)dy, kept, d, threads);
    else backward(a, (const float*)dy, kept, d, threads);
}

// x, dt, y (B, E); A (E, N); B, C (B, N); D (E) or null; state (B, E, N).
API void selective_step(int data, const void* x, const float* dt, const float* A, const float* B, const float* C,
                        const float* D, float* state, void* y, long batch, long channels, long width, int threads) {
    parallel(threads_for(threads, batch * channels * width), batch, [&](long b, int) {
        const long at = b * channels, from = b * width;
        float* S = state + at * width;
        auto run = [&](auto* in, auto* out) {
            step(in + at, dt + at, A, B + from, C + from, D, S, out + at, channels, width);
        };
        if (data) run((const bf16*)x, (bf16*)y);
        else run((const float*)x, (float*)y);
    });
}
