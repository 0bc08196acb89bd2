// Many rows of x against int8 or int4 on processors with dot products of bytes (VNNI): x in 8 bits too, 1/127 of the
// largest number of its group apart, four columns a word. A group's sum is an exact integer.
//
// The instruction multiplies unsigned by signed bytes: int8 weights are moved up by 128, and what that adds, 128 times the
// sum of a group of x, is what its sum begins with. Shape letters: R rows, G groups of 32 columns, Q of four.
#pragma once
#include <vector>

#include "panel.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BF16__) && !defined(__AMX_BF16__)  // whose tiles are faster still
#define INTARSIA_BYTES
constexpr int HELD_BYTES = 6;  // rows whose sums stay in registers, for two panels

struct ByteRows {
    std::vector<int8_t> codes;          // (R, G, 32)
    std::vector<int32_t> begin;         // (R, G): -128 times the sum of a group's codes
    std::vector<float> scales, totals;  // (R, G): of a code; the group's sum, which its weights' least number takes

    void make_room(const Packed& w, long rows) {
        const size_t groups = rows * w.groups();
        if (begin.size() >= groups) return;
        codes.resize(groups * GROUP), begin.resize(groups), scales.resize(groups), totals.resize(groups);
    }

    // Row `row` of x. What takes one number a group is done for vectors of groups.
    template <class T> void set(const Packed& w, const T* x, long row) {
        const long groups = w.groups(), first = row * groups;
        float *scale = &scales[first], *total = &totals[first];
        const auto group = [&](long g) {
            const long left = w.inputs - g * GROUP;
            return low_group(x + g * GROUP, left < GROUP ? (1u << left) - 1 : ~0u);
        };
        for (long g = 0; g < groups; g++) scale[g] = largest_of(group(g));
        each_vec(groups, [&](long g, auto part) {
            const vec top = load(scale + g, part), up = select(top > 0.0f, 127.0f / top, vec{});
            store(total + g, up, part), store(scale + g, top * (1 / 127.0f), part);
        });
        for (long g = 0; g < groups; g++) begin[first + g] = -128 * set_codes(group(g), total[g], &codes[(first + g) * GROUP]);
        for (long g = 0; g < groups; g++) total[g] = scale[g] * begin[first + g] * (-1 / 128.0f);
    }

   private:
    // 32 numbers in bfloat16, zeros for those that are not there.
    static __m512i low_group(const bf16* x, __mmask32 there) { return _mm512_maskz_loadu_epi16(there, x); }
    static __m512i low_group(const float* x, __mmask32 there) {
        const __m512 first = _mm512_maskz_loadu_ps(there, x), second = _mm512_maskz_loadu_ps(there >> 16, x + 16);
        return as<__m512i>(_mm512_cvtne2ps_pbh(second, first));
    }
    static float largest_of(__m512i low) {  // of the numbers without their signs; the processor has a minimum of eight
        const __m512i turned = _mm512_or_si512(_mm512_xor_si512(low, _mm512_set1_epi16(-1)), _mm512_set1_epi16(-32768));
        const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(turned), _mm512_extracti64x4_epi64(turned, 1));
        const __m128i quarter = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        return as<float>(~uint32_t(_mm_extract_epi16(_mm_minpos_epu16(quarter), 0)) << 16);
    }
    static int32_t set_codes(__m512i low, float up, int8_t* to) {  // their sum
        const auto turned = [&](__m256i part) {
            const vec numbers = as<vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16));
            return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(as<__m512>(numbers * up)));
        };
        const __m128i first = turned(_mm512_castsi512_si256(low)), second = turned(_mm512_extracti64x4_epi64(low, 1));
        const __m256i both = _mm256_set_m128i(second, first), above = _mm256_xor_si256(both, _mm256_set1_epi8(-128));
        memcpy(to, &both, GROUP);
        const __m256i sums = _mm256_sad_epu8(above, __m256i{});
        const __m128i pair = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        return int32_t(pair[0] + pair[1]) - 128 * int32_t(GROUP);
    }
};

// A panel's codes as unsigned bytes, four columns of every output together: (G, 8, 16, 4).
template <int KIND> void to_quads(const uint8_t* codes, long groups, uint8_t* to) {
    constexpr long QUAD = KIND == INT8 ? 4 * PANEL : 2 * PANEL;  // bytes
    for (long q = 0; q < groups * 8; q++, codes += QUAD, to += 4 * PANEL) {
        const __m256i first = read<__m256i>(codes), nibble = _mm256_set1_epi8(15);
        const __m256i low = KIND == INT8 ? first : _mm256_and_si256(first, nibble);
        const __m256i high = KIND == INT8 ? read<__m256i>(codes + 2 * PANEL)
                                          : _mm256_and_si256(_mm256_srli_epi16(first, 4), nibble);
        const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
        const __m512i up = KIND == INT8 ? _mm512_xor_si512(both, _mm512_set1_epi8(-128)) : both;
        memcpy(to, &up, 64);
    }
}

struct Quads {  // two panels
    const uint8_t* codes[2];
    const bf16* scales[2];
    const uint8_t* next;  // what to ask for meanwhile: the two behind them, as packed
};

// R rows of x from `first` on against two panels -> sums (R, 32).
template <int KIND, int R>
void byte_rows(const ByteRows& x, long first, const Quads& w, long groups, float* sums) {
    floats all[2][R] = {};
    for (long g = 0; g < groups; g++) {
        constexpr long LINES = 2 * GROUP * PANEL / (KIND == INT8 ? 1 : 2);
        if (!first)
            for (long line = 0; line < LINES; line += 64) __builtin_prefetch(w.next + g * LINES + line, 0, 2);
        const long at = first * groups + g;
        __m512i exact[2][R];
        for (int r = 0; r < R; r++)
            exact[0][r] = exact[1][r] = KIND == INT8 ? _mm512_set1_epi32(x.begin[at + r * groups]) : __m512i{};
#pragma GCC unroll 8
        for (long q = 0; q < GROUP / 4; q++) {
            const __m512i left = read<__m512i>(w.codes[0] + (g * 8 + q) * 64);
            const __m512i right = read<__m512i>(w.codes[1] + (g * 8 + q) * 64);
            for (int r = 0; r < R; r++) {
                const __m512i four = _mm512_set1_epi32(read<int32_t>(&x.codes[(at + r * groups) * GROUP + 4 * q]));
                exact[0][r] = _mm512_dpbusd_epi32(exact[0][r], left, four);
                exact[1][r] = _mm512_dpbusd_epi32(exact[1][r], right, four);
            }
        }
        for (int p = 0; p < 2; p++) {
            const bf16* scales = w.scales[p] + g * (KIND == INT4 ? 2 * PANEL : PANEL);
            const floats scale = widened(scales), least = KIND == INT4 ? widened(scales + PANEL) : floats{};
            for (int r = 0; r < R; r++) {
                all[p][r] += as<floats>(_mm512_cvtepi32_ps(exact[p][r])) * (scale * x.scales[at + r * groups]);
                if (KIND == INT4) all[p][r] += least * x.totals[at + r * groups];
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int p = 0; p < 2; p++) memcpy(sums + r * 32 + p * PANEL, &all[p][r], 64);
}

// Up to HELD_BYTES rows.
template <int KIND> void byte_rows(long rows, const ByteRows& x, long first, const Quads& w, long groups, float* sums) {
    switch (rows) {
        case 1: return byte_rows<KIND, 1>(x, first, w, groups, sums);
        case 2: return byte_rows<KIND, 2>(x, first, w, groups, sums);
        case 3: return byte_rows<KIND, 3>(x, first, w, groups, sums);
        case 4: return byte_rows<KIND, 4>(x, first, w, groups, sums);
        case 5: return byte_rows<KIND, 5>(x, first, w, groups, sums);
        default: return byte_rows<KIND, HELD_BYTES>(x, first, w, groups, sums);
    }
}

#endif
