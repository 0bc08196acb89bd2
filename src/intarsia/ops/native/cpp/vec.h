// Vectors of float32 as wide as the processor's registers, and the functions that the kernels need of them.
// Written with the compiler's own vectors: one text for SSE, AVX2, AVX-512 and NEON.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int W = 16;  // numbers in a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#define API extern "C" __attribute__((visibility("default")))

typedef float vec __attribute__((vector_size(W * 4)));
typedef int32_t ivec __attribute__((vector_size(W * 4)));
typedef uint32_t uvec __attribute__((vector_size(W * 4)));
typedef uint16_t hvec __attribute__((vector_size(W * 2)));

struct bf16 {
    uint16_t bits;
};

template <class To, class From> inline To as(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &v, sizeof to);
    return to;
}

inline vec broadcast(float x) { return vec{} + x; }
inline vec select(ivec mask, vec yes, vec no) { return as<vec>((mask & as<ivec>(yes)) | (~mask & as<ivec>(no))); }

// A NaN in x stays one.
inline vec clamp(vec x, float low, float high) {
#if defined(__AVX512F__)
    return as<vec>(_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), as<__m512>(x))));
#else
    x = select(x < low, broadcast(low), x);
    return select(x > high, broadcast(high), x);
#endif
}

inline vec load(const float* p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline vec load(const bf16* p) {
    hvec h;
    memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)
    return as<vec>(as<uvec>(_mm512_cvtepu16_epi32(as<__m256i>(h))) << 16);  // which compilers do not find by themselves
#else
    return as<vec>(__builtin_convertvector(h, uvec) << 16);
#endif
}

inline void store(float* p, vec v) { memcpy(p, &v, sizeof v); }

// Rounded to the nearest bfloat16, ties to even, in the upper half of every lane; a NaN stays one.
inline uvec rounded(vec v) {
    uvec bits = as<uvec>(v), up = bits + 0x7fff + ((bits >> 16) & 1);
    return as<uvec>(select(v == v, as<vec>(up), as<vec>(bits | 0x400000))) & 0xffff0000u;
}

inline void store(bf16* p, vec v) {
#if defined(__AVX512BF16__)
    auto h = _mm512_cvtneps_pbh(as<__m512>(v));
#else
    hvec h = __builtin_convertvector(rounded(v) >> 16, hvec);
#endif
    memcpy(p, &h, sizeof h);
}

// The last vector of a row may be a part of one: the same code runs with Full{} and with Part{n}.
struct Full {};
struct Part {
    long n;
};

template <class T> inline vec load(const T* p, Full) { return load(p); }
template <class T> inline void store(T* p, vec v, Full) { store(p, v); }
template <class T> inline vec load(const T* p, Part part) {
    T full[W] = {};
    memcpy(full, p, part.n * sizeof(T));
    return load(full);
}
template <class T> inline void store(T* p, vec v, Part part) {
    T full[W];
    store(full, v);
    memcpy(p, full, part.n * sizeof(T));
}

// f(i, Full or Part) for every vector of n numbers.
template <class F> inline void each_vec(long n, F f) {
    long i = 0;
    for (; i + W <= n; i += W) f(i, Full{});
    if (i < n) f(i, Part{n - i});
}

inline float get(const float* p, long i) { return p[i]; }
inline float get(const bf16* p, long i) { return as<float>(uint32_t(p[i].bits) << 16); }
inline void put(float* p, float v) { *p = v; }
inline void put(bf16* p, float v) {
    bf16 all[W];
    store(all, broadcast(v));
    *p = all[0];
}

inline float sum(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(as<__m512>(v));
#else
    float t[W];
    store(t, v);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) t[i] += t[i + half];
    return t[0];
#endif
}

inline vec larger(vec a, vec b) {
#if defined(__AVX512F__)
    return as<vec>(_mm512_max_ps(as<__m512>(a), as<__m512>(b)));
#else
    return select(a > b, a, b);
#endif
}

inline float largest(vec v) {
    float t[W];
    store(t, v);
    for (int i = 1; i < W; i++)
        if (t[i] > t[0]) t[0] = t[i];
    return t[0];
}

// The sums of W vectors, in their order.
inline vec each_sum(const vec* v) {
#if defined(__AVX512F__)
    __m512 half[8], quarter[4], pair[2];
    const auto at = [&](int i) { return as<__m512>(v[i]); };
    constexpr int order[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};  // so that they come out in order
    for (int i = 0; i < 8; i++) {
        const auto a = at(order[i]), b = at(order[i + 8]);
        half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    for (int i = 0; i < 4; i++)
        quarter[i] = _mm512_add_ps(_mm512_shuffle_f32x4(half[i], half[i + 4], 0x88),
                                   _mm512_shuffle_f32x4(half[i], half[i + 4], 0xdd));
    for (int i = 0; i < 2; i++)
        pair[i] = _mm512_add_ps(_mm512_shuffle_ps(quarter[i], quarter[i + 2], 0x44),
                                _mm512_shuffle_ps(quarter[i], quarter[i + 2], 0xee));
    return as<vec>(_mm512_add_ps(_mm512_shuffle_ps(pair[0], pair[1], 0x88), _mm512_shuffle_ps(pair[0], pair[1], 0xdd)));
#else
    vec sums;
    for (int i = 0; i < W; i++) sums[i] = sum(v[i]);
    return sums;
#endif
}

// Relative error under 2e-7 from -87.3 to 88.7, and the value at the nearer end outside of it.
inline vec exp(vec x) {
    x = clamp(x, -87.3f, 88.7f);
    vec shifted = x * 1.44269504f + 12582912.0f;  // the integer next to x / ln 2, in the low bits
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return as<vec>(as<uvec>(p) + (as<uvec>(shifted) << 23));
}

// 1 / x for x from 1 on, to the last bit or the one before.
inline vec reciprocal(vec x) {
#if defined(__AVX512F__)
    vec r = as<vec>(_mm512_rcp14_ps(as<__m512>(x)));  // a division keeps a port busy for 16 cycles
    return r * (2.0f - x * r);
#else
    return 1.0f / x;
#endif
}

inline vec sigmoid(vec x) { return select(x < -87.0f, vec{}, reciprocal(1.0f + exp(-x))); }
