// Products with packed weights. A few rows against int8 or int4: x becomes int16 group by group, the sums of a group are
// exact integers, outliers (outliers.h) come behind them. Many rows of x become int8 where bytes are multiplied (bytes.h)
// and there are no outliers. Else the weight of a panel becomes bfloat16, if it is not, and blocks of rows multiply. All
// sums over a row's groups or columns go in one order, whatever the number of rows.
#include "packed.h"

#include <type_traits>
#include <vector>

#include "bytes.h"
#include "outliers.h"
#include "panel.h"
#include "pool.h"

namespace {

constexpr long FEW = 16;    // rows that integers take, 8 at a time while a panel is in the cache
constexpr long SHARES = 8;  // items a thread: one that is held up leaves its share to others

typedef int16_t shorts __attribute__((vector_size(64)));  // 16 outputs x 2 columns
typedef int8_t bytes __attribute__((vector_size(32)));
typedef uint8_t ubytes __attribute__((vector_size(32)));

// sums + the products of both columns; x: two numbers.
inline ints dot(ints sums, shorts w, const int16_t* x) {
#if defined(__AVX512VNNI__)
    return as<ints>(_mm512_dpwssd_epi32(as<__m512i>(sums), as<__m512i>(w), _mm512_set1_epi32(read<int32_t>(x))));
#elif defined(__AVX512BW__)
    return sums + as<ints>(_mm512_madd_epi16(as<__m512i>(w), _mm512_set1_epi32(read<int32_t>(x))));
#else
    const ints pairs = as<ints>(w);
    return sums + (pairs << 16 >> 16) * int32_t(x[0]) + (pairs >> 16) * int32_t(x[1]);
#endif
}

inline shorts widened(const int8_t* p) {
#if defined(__AVX512BW__)
    return as<shorts>(_mm512_cvtepi8_epi16(read<__m256i>(p)));
#else
    return __builtin_convertvector(read<bytes>(p), shorts);
#endif
}
inline shorts widened(const uint8_t* p) {
#if defined(__AVX512BW__)
    return as<shorts>(_mm512_cvtepu8_epi16(read<__m256i>(p)));
#else
    return __builtin_convertvector(read<ubytes>(p), shorts);
#endif
}

// Codes of one group of a panel, pair by pair: f(pair, 16 x 2 numbers).
template <int KIND, class F> inline void each_pair(const void* group, F f) {
    for (long pair = 0; pair < GROUP / 2; pair++) {
        if (KIND == INT8) f(pair, widened((const int8_t*)group + pair * 2 * PANEL));
        if (KIND == INT4 && pair % 2 == 0) {
            const shorts two = widened((const uint8_t*)group + pair * PANEL);
            f(pair, two & 15);
            f(pair + 1, two >> 4);
        }
    }
}

constexpr long group_bytes(int kind) { return GROUP * PANEL * (kind == BF16 ? 4 : kind == INT4 ? 1 : 2) / 2; }
constexpr long group_scales(int kind) { return kind == INT4 || kind == SPARSE ? 2 * PANEL : PANEL; }

// x in 16 bits, 1/32767 of the largest number of its group apart.
struct Integers {
    std::vector<int16_t> codes;         // (R, groups, 32)
    std::vector<float> scales, totals;  // (R, groups); the sum of a group of x, which its weights' least number takes

    template <class T> void set(const Packed& w, const T* x, long x_row, long rows) {
        const long groups = w.groups();
        codes.resize(rows * w.columns), scales.resize(rows * groups), totals.resize(rows * groups);
        for (long r = 0; r < rows; r++)
            for (long g = 0; g < groups; g++) {
                const long count = w.inputs - g * GROUP < GROUP ? w.inputs - g * GROUP : GROUP;
                set_group(x + r * x_row + g * GROUP, count, r * groups + g);
            }
    }

   private:
    template <class T> void set_group(const T* x, long count, long at) {
        float values[GROUP] = {};
        each_vec(count, [&](long i, auto part) { store(values + i, load(x + i, part), part); });
        vec most{};
        for (long i = 0; i < GROUP; i += W) most = larger(as<vec>(as<uvec>(load(values + i)) & 0x7fffffffu), most);
        const float top = largest(most), up = top > 0 ? 32767.0f / top : 0.0f;
        ivec sums{};
        for (long i = 0; i < GROUP; i += W) {
            const ivec turned = as<ivec>(load(values + i) * up + 12582912.0f) << 16 >> 16;  // the nearest integers
            const auto low = __builtin_convertvector(turned, short __attribute__((vector_size(W * 2))));
            memcpy(&codes[at * GROUP + i], &low, sizeof low);
            sums += turned;
        }
        int32_t total = 0;
        for (int i = 0; i < W; i++) total += sums[i];
        scales[at] = top / 32767.0f, totals[at] = scales[at] * total;
    }
};

template <int KIND, int R> void integer_panel(const Packed& w, long panel, const Integers& x, long first, floats* out) {
    const long groups = w.groups();
    const char* codes = (const char*)w.codes + panel * groups * group_bytes(KIND);
    const bf16* scales = w.scales + panel * groups * group_scales(KIND);
    floats sums[R] = {};
    for (long g = 0; g < groups; g++, codes += group_bytes(KIND)) {
        const long at = first * groups + g;
        for (long line = 0; line < group_bytes(KIND); line += 64) {
            __builtin_prefetch(codes + AHEAD + line);
            __builtin_prefetch(codes + FAR + line, 0, 2);
        }
        ints exact[R] = {};
        each_pair<KIND>(codes, [&](long pair, shorts weight) {
            for (int r = 0; r < R; r++)
                exact[r] = dot(exact[r], weight, x.codes.data() + (at + r * groups) * GROUP + 2 * pair);
        });
        const floats scale = widened(scales), least = KIND == INT4 ? widened(scales + PANEL) : floats{};
        scales += group_scales(KIND);
        for (int r = 0; r < R; r++) {
            sums[r] += __builtin_convertvector(exact[r], floats) * (scale * x.scales[at + r * groups]);
            if (KIND == INT4) sums[r] += least * x.totals[at + r * groups];
        }
    }
    for (int r = 0; r < R; r++) out[r] = sums[r];
}

template <int KIND> void integer_panel(long rows, const Packed& w, long panel, const Integers& x, floats* out) {
    for (long r = 0; r < rows; r += 8) switch (rows - r) {
            case 1: integer_panel<KIND, 1>(w, panel, x, r, out + r); break;
            case 2: integer_panel<KIND, 2>(w, panel, x, r, out + r); break;
            case 3: integer_panel<KIND, 3>(w, panel, x, r, out + r); break;
            case 4: integer_panel<KIND, 4>(w, panel, x, r, out + r); break;
            case 5: integer_panel<KIND, 5>(w, panel, x, r, out + r); break;
            case 6: integer_panel<KIND, 6>(w, panel, x, r, out + r); break;
            case 7: integer_panel<KIND, 7>(w, panel, x, r, out + r); break;
            default: integer_panel<KIND, 8>(w, panel, x, r, out + r);
        }
}

// One group of a panel in bfloat16, scale and all, as tiles read it: (16 pairs, 16 outputs, 2).
template <int KIND> void to_bf16(const void* codes, const bf16* scales, bf16* to) {
    const floats scale = widened(scales), least = KIND == INT4 ? widened(scales + PANEL) : floats{};
    each_pair<KIND>(codes, [&](long pair, shorts weight) {
        const ints pairs = as<ints>(weight);
        const floats even = __builtin_convertvector(pairs << 16 >> 16, floats) * scale + least;
        const floats odd = __builtin_convertvector(pairs >> 16, floats) * scale + least;
#if defined(__AVX512BF16__)
        const auto low = _mm512_cvtepu16_epi32(as<__m256i>(_mm512_cvtneps_pbh(as<__m512>(even))));
        const auto high = _mm512_cvtepu16_epi32(as<__m256i>(_mm512_cvtneps_pbh(as<__m512>(odd))));
        const auto both = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        memcpy(to + pair * 2 * PANEL, &both, 64);
#else
        for (int o = 0; o < PANEL; o++) put(to + (pair * PANEL + o) * 2, even[o]), put(to + (pair * PANEL + o) * 2 + 1, odd[o]);
#endif
    });
}

// One group of a sparse panel in bfloat16, as `to_bf16` leaves it. kept (8, 16, 2); bits (8, 4).
void to_dense(const bf16* kept, const bf16* bits, bf16* to) {
    for (long quad = 0; quad < GROUP / 4; quad++, kept += 2 * PANEL, bits += 4, to += 4 * PANEL) {
        __builtin_prefetch((const char*)kept + FAR, 0, 2);
#if defined(__AVX512BW__)
        const __m512i both = read<__m512i>(kept), second = _mm512_srli_epi32(both, 16);
        const __m512i first = _mm512_and_si512(both, _mm512_set1_epi32(0xffff));
        const __mmask16 a = bits[0].bits, b = bits[1].bits, c = bits[2].bits, d = bits[3].bits, before = a | b;
        const auto column = [&](__mmask16 mine, __mmask16 behind) {  // the second one where one is kept before it
            return _mm512_mask_mov_epi32(_mm512_maskz_mov_epi32(mine & ~behind, first), mine & behind, second);
        };
        const __m512i low = _mm512_or_si512(_mm512_maskz_mov_epi32(a, first), _mm512_slli_epi32(column(b, a), 16));
        const __m512i high = _mm512_or_si512(column(c, before), _mm512_slli_epi32(_mm512_maskz_mov_epi32(d, second), 16));
        memcpy(to, &low, 64), memcpy(to + 2 * PANEL, &high, 64);
#else
        for (long o = 0; o < PANEL; o++)
            for (long i = 0, used = 0; i < 4; i++)
                to[(i / 2 * PANEL + o) * 2 + i % 2] = bits[i].bits >> o & 1 ? kept[o * 2 + used++] : bf16{0};
#endif
    }
}

// The panel in bfloat16: where it lies, or in `space` (I * 16).
const bf16* low_panel(const Packed& w, long panel, bf16* space) {
    const long groups = w.groups();
    const char* codes = (const char*)w.codes + panel * groups * group_bytes(w.kind);
    if (w.kind == BF16) return (const bf16*)codes;
    for (long g = 0; g < groups; g++, codes += group_bytes(w.kind)) {
        const bf16* scales = w.scales + (panel * groups + g) * group_scales(w.kind);
        bf16* to = space + g * GROUP * PANEL;
        if (w.kind == INT8) to_bf16<INT8>(codes, scales, to);
        if (w.kind == INT4) to_bf16<INT4>(codes, scales, to);
        if (w.kind == SPARSE) to_dense((const bf16*)codes, scales, to);
    }
    Outliers(w, panel).add_to(space);
    return space;
}

template <class T> void write(const Packed& w, long panel, const float* sums, T* y) {
    for (long o = 0; o < PANEL; o += W) {
        const long at = panel * PANEL + o;
        const vec out = w.bias ? load(sums + o) + load(w.bias + at) : load(sums + o);
        store(y + at, out);
    }
}

// Sums (count, 32) of two panels -> rows of y.
template <class T> void write_pair(const Packed& w, long pair, const float* sums, long count, T* y, long y_row) {
    for (long r = 0; r < count; r++)
        for (int p = 0; p < 2; p++) write(w, 2 * pair + p, sums + r * 32 + p * PANEL, y + r * y_row);
}

// f(i) for every panel, or pair of panels, of a product with so many rows, in shares.
template <class F> void each_share(const Packed& w, long rows, int threads, long count, F f) {
    threads = threads_for(threads, rows * w.outputs * w.columns);
    const long each = count / (threads * SHARES) + 1;
    parallel(threads, (count + each - 1) / each, [&](long item, int) {
        for (long i = item * each; i < count && i < (item + 1) * each; i++) f(i);
    });
}

// Two panels against all rows. space: (2 I * 16); sums: (32, 32).
template <class T>
void multiply_pair(const Packed& w, long pair, const bf16* x, long x_row, T* y, long y_row, long rows, bf16* space,
                   float* sums) {
    const bf16* first = low_panel(w, 2 * pair, space);
    const bf16* second = low_panel(w, 2 * pair + 1, space + w.columns * PANEL);
    const bf16* next = w.kind == BF16 ? second + w.columns * PANEL : nullptr;
    auto block = [&](long r, long held) {
        low_block(x + r * x_row, x_row, held, first, second, r ? nullptr : next, w.columns, sums);
        write_pair(w, pair, sums, held, y + r * y_row, y_row);
    };
    const long full = rows / BLOCK_ROWS * BLOCK_ROWS, rest = rows - full;
    if (full) {
        Tiles tiles(16, 16);
        for (long r = 0; r < full; r += BLOCK_ROWS) block(r, BLOCK_ROWS);
    }
    if (rest) {
        Tiles tiles(rest < 16 ? rest : 16, rest > 16 ? rest - 16 : 16);
        block(full, rest);
    }
}

template <class T>
void multiply_low(const Packed& w, const bf16* x, long x_row, T* y, long y_row, long rows, int threads) {
    each_share(w, rows, threads, w.panels() / 2, [&](long pair) {
        bf16* space = (bf16*)scratch((2 * w.columns * PANEL + 2 * BLOCK_ROWS * 32) * sizeof(bf16));
        multiply_pair(w, pair, x, x_row, y, y_row, rows, space + 2 * BLOCK_ROWS * 32, (float*)space);
    });
}

template <class T>
void multiply_integers(const Packed& w, const T* x, long x_row, T* y, long y_row, long rows, int threads) {
    thread_local Integers mine;
    Integers& left = mine;
    left.set(w, x, x_row, rows);
    each_share(w, rows, threads, w.panels(), [&](long panel) {
        floats sums[FEW];
        w.kind == INT8 ? integer_panel<INT8>(rows, w, panel, left, sums) : integer_panel<INT4>(rows, w, panel, left, sums);
        Outliers(w, panel).add(x, x_row, rows, sums);
        for (long r = 0; r < rows; r++) write(w, panel, (const float*)&sums[r], y + r * y_row);
    });
}

#if defined(INTARSIA_BYTES)
// Two panels against all rows. space: (2 I * 16).
template <int KIND, class T>
void multiply_quads(const Packed& w, long pair, const ByteRows& x, T* y, long y_row, long rows, uint8_t* space) {
    Quads quads;
    const uint8_t* codes = (const uint8_t*)w.codes + 2 * pair * w.groups() * group_bytes(KIND);
    for (long p = 0; p < 2; p++, codes += w.groups() * group_bytes(KIND), space += w.columns * PANEL) {
        to_quads<KIND>(codes, w.groups(), space);
        quads.codes[p] = space, quads.scales[p] = w.scales + (2 * pair + p) * w.groups() * group_scales(KIND);
    }
    quads.next = codes;
    alignas(64) float sums[HELD_BYTES * 32];
    for (long r = 0; r < rows; r += HELD_BYTES) {
        const long held = rows - r < HELD_BYTES ? rows - r : HELD_BYTES;
        byte_rows<KIND>(held, x, r, quads, w.groups(), sums);
        write_pair(w, pair, sums, held, y + r * y_row, y_row);
    }
}

template <class T>
void multiply_bytes(const Packed& w, const T* x, long x_row, T* y, long y_row, long rows, int threads) {
    thread_local ByteRows mine;
    ByteRows& left = mine;
    left.make_room(w, rows);
    parallel(threads_for(threads, rows * w.columns), (rows + 15) / 16, [&](long item, int) {
        for (long r = item * 16; r < rows && r < (item + 1) * 16; r++) left.set(w, x + r * x_row, r);
    });
    each_share(w, rows, threads, w.panels() / 2, [&](long pair) {
        uint8_t* space = (uint8_t*)scratch(2 * w.columns * PANEL);
        w.kind == INT8 ? multiply_quads<INT8>(w, pair, left, y, y_row, rows, space)
                       : multiply_quads<INT4>(w, pair, left, y, y_row, rows, space);
    });
}
#endif

// x as tiles read it: bfloat16, zeros behind its columns.
template <class T> const bf16* low_rows(const Packed& w, const T* x, long* x_row, long rows) {
    thread_local std::vector<bf16> mine;
    if (std::is_same<T, bf16>::value && w.inputs == w.columns) return (const bf16*)x;
    mine.resize(rows * w.columns);
    for (long r = 0; r < rows; r++) {
        bf16* to = mine.data() + r * w.columns;
        each_vec(w.inputs, [&](long i, auto part) { store(to + i, load(x + r * *x_row + i, part), part); });
        memset(to + w.inputs, 0, (w.columns - w.inputs) * sizeof(bf16));
    }
    *x_row = w.columns;
    return mine.data();
}

template <class T> void product(const Packed& w, const T* x, long x_row, T* y, long y_row, long rows, int threads) {
    const bool codes = w.kind == INT8 || w.kind == INT4;
    if (codes && rows <= FEW) return multiply_integers(w, x, x_row, y, y_row, rows, threads);
#if defined(INTARSIA_BYTES)
    if (codes && !w.each) return multiply_bytes(w, x, x_row, y, y_row, rows, threads);
#endif
    const bf16* low = low_rows(w, x, &x_row, rows);
    multiply_low(w, low, x_row, y, y_row, rows, threads);
}

}  // namespace

void multiply(const Packed& w, const float* x, long x_row, float* y, long y_row, long rows, int threads) {
    product(w, x, x_row, y, y_row, rows, threads);
}
void multiply(const Packed& w, const bf16* x, long x_row, bf16* y, long y_row, long rows, int threads) {
    product(w, x, x_row, y, y_row, rows, threads);
}

void one_row(const Packed& w, long output, float* row) {
    const long panel = output / PANEL, lane = output % PANEL;
    for (long g = 0; g < w.groups(); g++) {
        const long group = panel * w.groups() + g;
        const char* codes = (const char*)w.codes + group * group_bytes(w.kind);
        const long at_scale = group * group_scales(w.kind) + lane;
        const bool whole = w.kind == BF16 || w.kind == SPARSE;
        const float scale = whole ? 1.0f : get(w.scales, at_scale);
        bf16 dense[GROUP * PANEL];
        if (w.kind == SPARSE) to_dense((const bf16*)codes, w.scales + group * group_scales(SPARSE), dense);
        const float least = w.kind == INT4 ? get(w.scales, at_scale + PANEL) : 0.0f;
        for (long i = 0; i < GROUP && g * GROUP + i < w.inputs; i++) {
            const long at = (i / 2 * PANEL + lane) * 2 + i % 2;  // of a number in its group
            float code = 0;
            if (whole) code = get(w.kind == BF16 ? (const bf16*)codes : dense, at);
            if (w.kind == INT8) code = ((const int8_t*)codes)[at];
            if (w.kind == INT4) {
                const uint8_t two = ((const uint8_t*)codes)[i / 4 * 2 * PANEL + lane * 2 + i % 2];
                code = i / 2 % 2 ? two >> 4 : two & 15;
            }
            row[g * GROUP + i] = code * scale + least;
        }
    }
    Outliers(w, panel).add_to_row(lane, row);
}

// data: the dtype of x and y, 0 float32 and 1 bfloat16; y (R, O) with O as packed.
API void packed_linear(int data, const Packed* w, const void* x, long x_row, void* y, long rows, int threads) {
    data ? multiply(*w, (const bf16*)x, x_row, (bf16*)y, w->outputs, rows, threads)
         : multiply(*w, (const float*)x, x_row, (float*)y, w->outputs, rows, threads);
}

// Rows of the weight, (count, inputs).
API void packed_rows(const Packed* w, const int64_t* outputs, long count, float* rows) {
    for (long i = 0; i < count; i++) one_row(*w, outputs[i], rows + i * w->inputs);
}
