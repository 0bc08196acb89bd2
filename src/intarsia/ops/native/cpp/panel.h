// Panels of 16 outputs: their vectors, and a block of rows of x against two panels in bfloat16, in tiles where the
// processor has them, else in registers. The weight is read once for a block, and the sums of a row go in one order,
// whatever the number of rows.
#pragma once
#include "packed.h"
#include "product.h"

constexpr long AHEAD = 2048;     // bytes that are asked for before they are needed,
constexpr long FAR = 8192;       // and before that into the second-level cache
constexpr long BLOCK_ROWS = 32;  // most rows of a block

typedef float floats __attribute__((vector_size(64)));  // one number for every output of a panel
typedef int32_t ints __attribute__((vector_size(64)));

template <class To, class P> inline To read(const P* p) {
    To to;
    memcpy(&to, p, sizeof to);
    return to;
}

inline floats widened(const bf16* p) {
#if defined(__AVX512F__)
    return as<floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(p)), 16));
#else
    typedef uint16_t halves __attribute__((vector_size(32)));
    return as<floats>(__builtin_convertvector(read<halves>(p), ints) << 16);
#endif
}

#if defined(__AMX_BF16__)

// Up to 32 rows of x against two panels -> sums (rows, 32). The tiles must have been shaped for so many rows.
inline void low_block(const bf16* x, long x_row, long rows, const bf16* first, const bf16* second, const bf16*,
                      long columns, float* sums) {
    const bool both = rows > 16;
    Tiles::zero<0>(), Tiles::zero<1>();
    if (both) Tiles::zero<2>(), Tiles::zero<3>();
    for (long i = 0; i < columns; i += 32) {
        Tiles::load<4>(x + i, x_row * 2);
        Tiles::load<6>(first + i * PANEL, 64), Tiles::load<7>(second + i * PANEL, 64);
        Tiles::dot<0, 4, 6>(), Tiles::dot<1, 4, 7>();
        if (both) {
            Tiles::load<5>(x + 16 * x_row + i, x_row * 2);
            Tiles::dot<2, 5, 6>(), Tiles::dot<3, 5, 7>();
        } else {
            for (long line = 0; line < 1024; line += 64) {
                __builtin_prefetch((const char*)(first + i * PANEL) + AHEAD + line);
                __builtin_prefetch((const char*)(second + i * PANEL) + AHEAD + line);
            }
        }
    }
    Tiles::store<0>(sums, 128), Tiles::store<1>(sums + 16, 128);
    if (both) Tiles::store<2>(sums + 16 * 32, 128), Tiles::store<3>(sums + 16 * 32 + 16, 128);
}

#else

struct Tiles {
    Tiles(int, int) {}
};

// Columns i and i + 1 of 16 outputs; `add` is sums + their products with two numbers of x, in order.
#if defined(__AVX512BF16__)
constexpr int HELD_ROWS = 8;  // rows whose sums stay in registers, for two panels
struct Two {
    __m512bh pairs;
    explicit Two(const bf16* p) : pairs(as<__m512bh>(_mm512_loadu_si512(p))) {}
    floats add(floats sums, const bf16* x) const {
        const __m512bh both = as<__m512bh>(_mm512_set1_epi32(read<int32_t>(x)));
        return as<floats>(_mm512_dpbf16_ps(as<__m512>(sums), pairs, both));
    }
};
#else
constexpr int HELD_ROWS = W == 16 ? 4 : 2;
struct Two {
    floats even, odd;
    explicit Two(const bf16* p) {
        const ints pairs = read<ints>(p);
        even = as<floats>(pairs << 16), odd = as<floats>(pairs & int32_t(0xffff0000));
    }
    floats add(floats sums, const bf16* x) const {
        sums += even * get(x, 0);
        return sums + odd * get(x, 1);
    }
};
#endif

// `next`: what to ask for meanwhile, as much as the two panels are, if they have been read before; else null.
template <int R>
void held_rows(const bf16* x, long x_row, const bf16* first, const bf16* second, const bf16* next, long columns,
               float* sums) {
    floats left[R] = {}, right[R] = {};
    for (long i = 0; i < columns; i += 2) {
        if (next) {
            __builtin_prefetch(next + 2 * i * PANEL, 0, 2);
            __builtin_prefetch(next + 2 * i * PANEL + 32, 0, 2);
        } else {
            for (const bf16* panel : {first, second}) {
                __builtin_prefetch((const char*)(panel + i * PANEL) + AHEAD);
                __builtin_prefetch((const char*)(panel + i * PANEL) + FAR, 0, 2);
            }
        }
        const Two a(first + i * PANEL), b(second + i * PANEL);
        for (int r = 0; r < R; r++) {
            left[r] = a.add(left[r], x + r * x_row + i);
            right[r] = b.add(right[r], x + r * x_row + i);
        }
    }
    for (int r = 0; r < R; r++) memcpy(sums + r * 32, &left[r], 64), memcpy(sums + r * 32 + PANEL, &right[r], 64);
}

// Up to 32 rows of x against two panels -> sums (rows, 32). While they are read again, `next`, what lies behind them, is
// asked for.
inline void low_block(const bf16* x, long x_row, long rows, const bf16* first, const bf16* second, const bf16* next,
                      long columns, float* sums) {
    for (long r = 0; r < rows; r += HELD_ROWS, x += HELD_ROWS * x_row, sums += HELD_ROWS * 32) {
        const bf16* meanwhile = r == HELD_ROWS ? next : nullptr;
        switch (rows - r) {
            case 1: held_rows<1>(x, x_row, first, second, meanwhile, columns, sums); break;
#if defined(__AVX512F__)
            case 2: held_rows<2>(x, x_row, first, second, meanwhile, columns, sums); break;
            case 3: held_rows<3>(x, x_row, first, second, meanwhile, columns, sums); break;
#endif
#if defined(__AVX512BF16__)
            case 4: held_rows<4>(x, x_row, first, second, meanwhile, columns, sums); break;
            case 5: held_rows<5>(x, x_row, first, second, meanwhile, columns, sums); break;
            case 6: held_rows<6>(x, x_row, first, second, meanwhile, columns, sums); break;
            case 7: held_rows<7>(x, x_row, first, second, meanwhile, columns, sums); break;
#endif
            default: held_rows<HELD_ROWS>(x, x_row, first, second, meanwhile, columns, sums);
        }
    }
}

#endif
