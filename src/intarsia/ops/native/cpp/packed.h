// Weights packed for reading: panels of 16 outputs, column pair by column pair, so that a vector, or a
// row of a tile, holds 16 outputs x 2 columns. Shape letters: O outputs, I columns, R rows of x.
#pragma once
#include "vec.h"

constexpr long PANEL = 16;  // outputs
constexpr long GROUP = 32;  // columns that share a scale

enum Kind { BF16, INT8, INT4, SPARSE };

// As ops/native/packed.py fills it. O and I are multiples of 32, filled up with zeros.
struct Packed {
    const void* codes;   // (O / 16, I / 2, 16, 2) numbers; of int4 two pairs of columns share bytes, the first one low;
                         // of sparse the two that are kept of every four columns, (O / 16, I / 4, 16, 2)
    const bf16* scales;  // int8 (O / 16, I / 32, 16); int4 (O / 16, I / 32, 2, 16), the second one its least number;
                         // sparse (O / 16, I / 4, 4), bits: which of the 16 outputs keep this column of the four
    const float* bias;   // (O,), or null
    const int32_t* outliers;  // (O / 16, each, 16) of an int4 weight that has them (outliers.h), or null
    long outputs, columns;
    long inputs;  // columns of x: the rest is filling
    long kind;
    long each;  // outliers of an output, 0 where there are none

    long groups() const { return columns / GROUP; }
    long panels() const { return outputs / PANEL; }
};

// y (R, y_row) = x (R, x_row) times w transposed, plus its bias. A row of y does not depend on the other rows, up to 16 of
// them; in bfloat16 never.
void multiply(const Packed& w, const float* x, long x_row, float* y, long y_row, long rows, int threads);
void multiply(const Packed& w, const bf16* x, long x_row, bf16* y, long y_row, long rows, int threads);

// Row `output` of the weight, (inputs,).
void one_row(const Packed& w, long output, float* row);
