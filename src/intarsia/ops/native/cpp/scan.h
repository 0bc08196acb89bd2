// What the scan's forward and backward share: shapes, how heads are divided, decays, and a chunk of a group.
//
// Shape letters: B batch, L length, H heads, P head dim, G groups, N state, Q tokens of a chunk. States are kept
// transposed, (N, P). Decays are running products of exp(dt A), one factor a token and none of them inverted: nothing
// cancels.
#pragma once
#include <initializer_list>

#include "pool.h"
#include "product.h"

namespace {  // every file that includes this compiles its own

constexpr long Q = 64;
constexpr long HEADS = 8;  // of a group that are computed together: their states fit into the second-level cache

struct Scan {
    const void *x, *b, *c;  // (B, L, H, P), (B, L, G, N) twice
    long x_batch, x_row, b_batch, b_row, c_batch, c_row;  // strides; the heads of a token lie together
    const float *dt, *a, *d, *state;                      // (B, L, H), (H,), (H,) or null, (B, H, P, N) or null
    const int32_t* segments;                              // (B, L) or null
    long batch, length, heads, size, groups, width;

    long padded_size() const { return (size + 31) / 32 * 32; }
    long padded_width() const { return (width + 31) / 32 * 32; }
};

// Numbers below 1e-38 count as zero, for as long as this lives: processors are slow on them, and decays end there.
class FlushTiny {
#if defined(__x86_64__)
    unsigned before_ = __builtin_ia32_stmxcsr();

   public:
    FlushTiny() { __builtin_ia32_ldmxcsr(before_ | 0x8040); }
    ~FlushTiny() { __builtin_ia32_ldmxcsr(before_); }
#else
   public:
    FlushTiny() {}
#endif
};

// Ask for numbers that the next chunk will read: they lie a long row away from each other.
template <class T> void fetch(const T* row, long count) {
    for (long i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(row + i, 0, 2);
}

// What a chunk needs that its heads share.
template <class E> struct Chunk {
    typedef typename E::low low;
    long first, tokens, rows;  // rows: tokens with padding, a multiple of 32
    bool starts[Q];            // a document begins at this token: what was before is forgotten
    low *b, *c;                // (rows, N) left operands
    low *b_right, *b_turned;   // (N, rows)
    low *c_right, *c_turned;   // (N, rows), only for the backward pass
    float* scores;             // (rows, rows): C_i . B_j, right on and below the diagonal

    Chunk(const Scan& s, Room& room) {
        for (low** m : {&b, &c, &b_right, &b_turned, &c_right, &c_turned}) *m = room.take<low>(Q * s.padded_width());
        scores = room.take<float>(Q * Q);
    }

    template <class T> void set(const Scan& s, long batch, long group, long from, bool backward = false) {
        first = from, tokens = s.length - from < Q ? s.length - from : Q, rows = (tokens + 31) / 32 * 32;
        const int32_t* ids = s.segments ? s.segments + batch * s.length + first : nullptr;
        for (long i = 0; i < rows; i++) starts[i] = ids && i < tokens && first + i > 0 && ids[i] != ids[i - 1];
        copy((const T*)s.b + batch * s.b_batch + first * s.b_row + group * s.width, s.b_row, b, s);
        copy((const T*)s.c + batch * s.c_batch + first * s.c_row + group * s.width, s.c_row, c, s);
        long width = s.padded_width();
        E::turn_right(b, b_right, rows, width);
        E::turn_left(b_right, b_turned, rows, width);
        if (backward) E::turn_right(c, c_right, rows, width), E::turn_left(c_right, c_turned, rows, width);
        for (long i = 0; i < rows; i += 32)
            E::product(32, i + 32, width, c + i * width, width, b_right, rows, scores + i * rows, rows, false);
    }

   private:
    template <class T> void copy(const T* from, long from_row, low* to, const Scan& s) const {
        const long width = s.padded_width();
        for (long i = 0; i < rows; i++, to += width, from += from_row) {
            const long there = i < tokens ? s.width : 0;
            fetch(from + Q * from_row, s.width);
            convert(from, to, there);
            memset((void*)(to + there), 0, (width - there) * sizeof(low));
        }
    }

};

// The time that passes in a chunk, for one head.
struct Decays {
    float time[Q], decay[Q];  // dt and exp(dt A), 0 where a document begins
    float from_start[Q];      // the product of the decays from the chunk's first token to this one
    float to_end[Q];          // that of the tokens behind this one

    template <class E> void set(const Scan& s, const Chunk<E>& chunk, long batch, long h) {
        const float* dt = s.dt + (batch * s.length + chunk.first) * s.heads + h;
        for (long i = 0; i < chunk.rows; i++) time[i] = i < chunk.tokens ? dt[i * s.heads] : 0.0f;
        for (long i = 0; i < chunk.rows; i += W) {
            vec exponent = load(time + i) * s.a[h];
            store(decay + i, select(exponent < -80.0f, vec{}, exp(exponent)));
        }
        float product = 1;
        for (long i = 0; i < chunk.rows; i++) {
            if (chunk.starts[i]) decay[i] = 0;
            from_start[i] = product *= decay[i];
        }
        product = 1;
        for (long i = chunk.rows - 1; i >= 0; i--) to_end[i] = product, product *= decay[i];
    }

    // f(i, j, v): v, W columns from j on of row i, is the product of the decays of tokens j + 1 to i; 0 above the
    // diagonal. Every j is visited, and for it every i from the last multiple of 32 on.
    template <class F> void each_pair(long rows, F f) const {
        for (long j = 0; j < rows; j += W) {
            vec left{}, place;
            for (int l = 0; l < W; l++) place[l] = float(j + l);
            for (long i = j / 32 * 32; i < rows; i++) {
                left *= decay[i];
                if (i < j + W) left = select(place == float(i), broadcast(1.0f), left);
                f(i, j, left);
            }
        }
    }
};

// x (rows, P) times a factor for every token, as a right operand; x (L, P) as it lies in memory.
template <class E, class T>
void put_tokens(typename E::low* right, long size, const T* x, long x_row, long columns, long tokens, long rows,
                const float* factor) {
    for (long j = 0; j < rows; j += 2, x += 2 * x_row)
        each_vec(columns, [&](long c, auto n) {
            vec even = j < tokens ? load(x + c, n) * factor[j] : vec{};
            vec odd = j + 1 < tokens ? load(x + x_row + c, n) * factor[j + 1] : vec{};
            E::put_pair(right, size, j, c, even, odd);
        });
}

// Some heads of one group.
struct Share {
    long batch, group, index, first, count;
};

// Every group in so many parts: states that fit into the cache, and `tasks` or more of them in all, if there are.
inline long parts_of(const Scan& s, long tasks) {
    const long heads = s.heads / s.groups;
    long parts = (heads + HEADS - 1) / HEADS;
    while (parts < heads && s.batch * s.groups * parts < tasks) parts++;
    return parts;
}

template <class F> void each_part(const Scan& s, long parts, int threads, F f) {
    const long heads = s.heads / s.groups;
    parallel(threads_for(threads, s.batch * s.length * s.heads * s.size), s.batch * s.groups * parts, [&](long item, int) {
        const long index = item % parts, group = item / parts % s.groups, batch = item / parts / s.groups;
        const long first = index * heads / parts, last = (index + 1) * heads / parts;
        f(Share{batch, group, index, group * heads + first, last - first});
    });
}

}  // namespace
