// Dense and sparse (SqueezeLLM, arXiv 2306.07629): what the int4 weights of every output lack at a few of its columns.
// A word holds the column in its upper half and below it, in bfloat16, what is added to the weight.
#pragma once
#include "panel.h"

struct Outliers {  // of one panel
    const int32_t* words;  // (each, 16)
    long each;

    Outliers(const Packed& w, long panel) : words(w.outliers + panel * w.each * PANEL), each(w.each) {}

    // sums (rows) + the products with rows of x. A row's come in one order, whatever the number of rows.
    template <class T> void add(const T* x, long x_row, long rows, floats* sums) const {
        for (long e = 0; e < each; e++) {
            const ints both = read<ints>(words + e * PANEL), columns = both >> 16 & 0xffff;
            const floats values = as<floats>(both << 16);
            for (long r = 0; r < rows; r++) sums[r] += values * picked(x + r * x_row, columns);
        }
    }

    // The panel in bfloat16 with them, (I / 2, 16, 2) in place: many rows then multiply both at once.
    void add_to(bf16* panel) const {
        for (long i = 0; i < each * PANEL; i++) {
            const long column = uint32_t(words[i]) >> 16;
            bf16* to = panel + (column / 2 * PANEL + i % PANEL) * 2 + column % 2;
            put(to, get(to, 0) + as<float>(uint32_t(words[i]) << 16));
        }
    }

    // What is added to one output's row.
    void add_to_row(long lane, float* row) const {
        for (long e = 0; e < each; e++) {
            const uint32_t word = words[e * PANEL + lane];
            row[word >> 16] += as<float>(word << 16);
        }
    }

   private:
    template <class T> static floats picked(const T* x, ints columns) {
        floats found;
        for (long o = 0; o < PANEL; o++) found[o] = get(x, columns[o]);
        return found;
    }
#if defined(__AVX512F__)
    static floats picked(const float* x, ints columns) {
        return as<floats>(_mm512_i32gather_ps(as<__m512i>(columns), x, sizeof(float)));
    }
#endif
};
