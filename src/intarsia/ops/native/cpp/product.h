// Matrix products of one chunk, all operands in the cache: C (m, n) = or += A (m, k) B (k, n), sums in float32.
//
// An engine says in what numbers the operands are (`low`), how a right operand lies in memory, and multiplies.
// All sizes are multiples of 32: the scan pads with zeros.
#pragma once
#include "vec.h"

// to (columns, rows) = from (rows, columns) transposed, in words of 32 bits.
inline void transpose(const uint32_t* from, long from_row, uint32_t* to, long to_row, long rows, long columns) {
    long full_rows = 0, full_columns = 0;
#if defined(__AVX512F__)
    full_rows = rows / 16 * 16, full_columns = columns / 16 * 16;
    typedef uint32_t words __attribute__((vector_size(64)));
    const words place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (long r = 0; r < full_rows; r += 16)
        for (long c = 0; c < full_columns; c += 16) {
            words v[16];
            for (int i = 0; i < 16; i++) memcpy(&v[i], from + (r + i) * from_row + c, 64);
#pragma GCC unroll 4
            for (uint32_t step = 1; step < 16; step *= 2) {  // swap the off-diagonal blocks of this size
                const words upper = as<words>((place & step) != 0);
                const words first = (upper & (place - step + 16)) | (~upper & place);
                const words second = (upper & (place + 16)) | (~upper & (place + step));
#pragma GCC unroll 16
                for (uint32_t i = 0; i < 16; i++)
                    if (!(i & step)) {
                        auto a = as<__m512i>(v[i]), b = as<__m512i>(v[i + step]);
                        v[i] = as<words>(_mm512_permutex2var_epi32(a, as<__m512i>(first), b));
                        v[i + step] = as<words>(_mm512_permutex2var_epi32(a, as<__m512i>(second), b));
                    }
            }
            for (int i = 0; i < 16; i++) memcpy(to + (c + i) * to_row + r, &v[i], 64);
        }
#endif
    for (long r = 0; r < rows; r++)
        for (long c = r < full_rows ? full_columns : 0; c < columns; c++) to[c * to_row + r] = from[r * from_row + c];
}

inline void transpose(const float* from, long from_row, float* to, long to_row, long rows, long columns) {
    transpose((const uint32_t*)from, from_row, (uint32_t*)to, to_row, rows, columns);
}

// Numbers of a row as an engine's.
template <class T> void convert(const T* from, T* to, long count) { memcpy((void*)to, from, count * sizeof(T)); }
template <class T, class low> void convert(const T* from, low* to, long count) {
    each_vec(count, [&](long n, auto part) { store(to + n, load(from + n, part), part); });
}

struct FloatEngine {
    typedef float low;

    // Rows k and k + 1 of a right operand, from column c on.
    static void put_pair(float* right, long columns, long k, long c, vec even, vec odd) {
        store(right + k * columns + c, even);
        store(right + (k + 1) * columns + c, odd);
    }

    // left (rows, columns) -> its transpose as a right operand, and that as a left operand (columns, rows).
    static void turn_right(const float* left, float* right, long rows, long columns) {
        transpose(left, columns, right, rows, rows, columns);
    }
    static void turn_left(const float* right, float* turned, long rows, long columns) {
        if (right != turned) memcpy(turned, right, rows * columns * sizeof(float));
    }

    static void product(long m, long n, long k, const float* a, long a_row, const float* b, long b_row, float* c,
                        long c_row, bool add) {
        constexpr int WIDE = W == 16 ? 4 : 2;
        long j = 0;
        for (; j + WIDE * W <= n; j += WIDE * W)
            for (long i = 0; i < m; i += 4) block<WIDE>(k, a + i * a_row, a_row, b + j, b_row, c + i * c_row + j, c_row, add);
        for (; j < n; j += W)
            for (long i = 0; i < m; i += 4) block<1>(k, a + i * a_row, a_row, b + j, b_row, c + i * c_row + j, c_row, add);
    }

   private:
    template <int V>
    static void block(long k, const float* a, long a_row, const float* b, long b_row, float* c, long c_row, bool add) {
        vec sums[4][V] = {};
        for (long l = 0; l < k; l++) {
            vec right[V];
            for (int v = 0; v < V; v++) right[v] = load(b + l * b_row + v * W);
            for (int i = 0; i < 4; i++) {
                vec left = broadcast(a[i * a_row + l]);
                for (int v = 0; v < V; v++) sums[i][v] += left * right[v];
            }
        }
        for (int i = 0; i < 4; i++)
            for (int v = 0; v < V; v++) {
                float* to = c + i * c_row + v * W;
                store(to, add ? load(to) + sums[i][v] : sums[i][v]);
            }
    }
};

#if defined(__AVX512BF16__)

struct Pairs {
    typedef bf16 low;  // a right operand has rows k and k + 1 side by side, number by number

    static void put_pair(bf16* right, long columns, long k, long c, vec even, vec odd) {
        const uint16_t e = 0, o = 16;  // the conversion leaves 16 numbers of `even` and then 16 of `odd`
        const __m512i sides = as<__m512i>((short __attribute__((vector_size(64)))){
            e, o, e + 1, o + 1, e + 2, o + 2, e + 3, o + 3, e + 4, o + 4, e + 5, o + 5, e + 6, o + 6, e + 7, o + 7,
            e + 8, o + 8, e + 9, o + 9, e + 10, o + 10, e + 11, o + 11, e + 12, o + 12, e + 13, o + 13, e + 14, o + 14,
            e + 15, o + 15});
        auto both = as<__m512i>(_mm512_cvtne2ps_pbh(as<__m512>(odd), as<__m512>(even)));
        both = _mm512_permutexvar_epi16(sides, both);
        memcpy(right + k * columns + 2 * c, &both, 64);
    }

    static void turn_right(const bf16* left, bf16* right, long rows, long columns) {
        transpose((const uint32_t*)left, columns / 2, (uint32_t*)right, rows, rows, columns / 2);
    }
    static void turn_left(const bf16* right, bf16* turned, long rows, long columns) {
        const uint32_t* pairs = (const uint32_t*)right;
        for (long c = 0; c < columns; c += 2)
            for (long r = 0; r < rows; r += 16) {
                auto pair = _mm512_loadu_si512(pairs + c / 2 * rows + r);
                _mm256_storeu_si256((__m256i*)(turned + c * rows + r), _mm512_cvtepi32_epi16(pair));
                pair = _mm512_srli_epi32(pair, 16);
                _mm256_storeu_si256((__m256i*)(turned + (c + 1) * rows + r), _mm512_cvtepi32_epi16(pair));
            }
    }
};

// Products of pairs in registers.
struct PairEngine : Pairs {
    static void product(long m, long n, long k, const bf16* a, long a_row, const bf16* b, long b_row, float* c,
                        long c_row, bool add) {
        for (long j = 0; j < n; j += 32)
            for (long i = 0; i < m; i += 8) block(k, a + i * a_row, a_row, b + j * 2, b_row, c + i * c_row + j, c_row, add);
    }

   private:
    // 8 x 32 sums.
    static void block(long k, const bf16* a, long a_row, const bf16* b, long b_row, float* c, long c_row, bool add) {
        __m512 sums[8][2];
        for (int i = 0; i < 8; i++)
            for (int v = 0; v < 2; v++) sums[i][v] = add ? _mm512_loadu_ps(c + i * c_row + v * 16) : _mm512_setzero_ps();
        for (long l = 0; l < k; l += 2) {
            const auto first = as<__m512bh>(_mm512_loadu_si512(b + l * b_row));
            const auto second = as<__m512bh>(_mm512_loadu_si512(b + l * b_row + 32));
            for (int i = 0; i < 8; i++) {
                int32_t pair;
                memcpy(&pair, a + i * a_row + l, 4);
                const auto left = as<__m512bh>(_mm512_set1_epi32(pair));
                sums[i][0] = _mm512_dpbf16_ps(sums[i][0], left, first);
                sums[i][1] = _mm512_dpbf16_ps(sums[i][1], left, second);
            }
        }
        for (int i = 0; i < 8; i++)
            for (int v = 0; v < 2; v++) _mm512_storeu_ps(c + i * c_row + v * 16, sums[i][v]);
    }
};

#endif

#if defined(__AMX_BF16__)

// The processor's tiles, 16 rows of 64 bytes each, for as long as this lives. Written in assembly because the
// intrinsics of gcc up to 12 do not tell the compiler what memory they read.
//
// Sums are in tiles 0 to 3, left operands in 4 and 5, right ones in 6 and 7; a left operand may have fewer rows than 16.
class Tiles {
   public:
    explicit Tiles(uint8_t upper = 16, uint8_t lower = 16) {
        struct alignas(64) Shape {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16];
        } shape = {};
        const uint8_t rows[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
        memcpy(shape.rows, rows, sizeof rows);
        static_assert(sizeof shape == 64);
        asm volatile("ldtilecfg %0" ::"m"(shape));
    }
    ~Tiles() { asm volatile("tilerelease"); }

    template <int T> static void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
    template <int T> static void load(const void* p, long stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
    }
    template <int T> static void store(void* p, long stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
    }
    template <int C, int A, int B> static void dot() {  // C += A B
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
};

struct TileEngine : Pairs {
    static void product(long m, long n, long k, const bf16* a, long a_row, const bf16* b, long b_row, float* c,
                        long c_row, bool add) {
        for (long i = 0; i < m; i += 32)
            for (long j = 0; j < n; j += 32)
                block(k, a + i * a_row, a_row * 2, b + j * 2, b_row * 4, c + i * c_row + j, c_row * 4, add);
    }

   private:
    // 32 x 32 sums in tiles 0 to 3; 4 and 5 hold the left operand, 6 and 7 the right one. Strides in bytes.
    static void block(long k, const bf16* a, long a_row, const bf16* b, long b_row, float* c, long c_row, bool add) {
        float* lower = c + 16 * c_row / 4;
        if (add) {
            Tiles::load<0>(c, c_row), Tiles::load<1>(c + 16, c_row);
            Tiles::load<2>(lower, c_row), Tiles::load<3>(lower + 16, c_row);
        } else {
            Tiles::zero<0>(), Tiles::zero<1>(), Tiles::zero<2>(), Tiles::zero<3>();
        }
        for (long l = 0; l < k; l += 32) {
            const char *left = (const char*)(a + l), *right = (const char*)b + l / 2 * b_row;
            Tiles::load<4>(left, a_row), Tiles::load<6>(right, b_row), Tiles::load<7>(right + 64, b_row);
            Tiles::dot<0, 4, 6>(), Tiles::dot<1, 4, 7>();
            Tiles::load<5>(left + 16 * a_row, a_row);
            Tiles::dot<2, 5, 6>(), Tiles::dot<3, 5, 7>();
        }
        Tiles::store<0>(c, c_row), Tiles::store<1>(c + 16, c_row);
        Tiles::store<2>(lower, c_row), Tiles::store<3>(lower + 16, c_row);
    }
};

#endif

// Who multiplies bfloat16, and what must be ready meanwhile.
struct Nothing {
    ~Nothing() {}
};

#if defined(__AMX_BF16__)
typedef TileEngine LowEngine;
typedef Tiles LowReady;
#elif defined(__AVX512BF16__)
typedef PairEngine LowEngine;
typedef Nothing LowReady;
#else
typedef FloatEngine LowEngine;
typedef Nothing LowReady;
#endif
