// A bfloat16 matrix times a few rows, as in decoding: the weight is read once, from its first row to its last, and the
// speed is that of memory. Shape letters: O rows of the weight, I its columns, B rows of x, 1 to 8.
#include "pool.h"
#include "vec.h"

namespace {

constexpr long PAIRS = W;             // of neighbouring columns in a vector
constexpr long AHEAD = 2048;          // bytes that are asked for before they are needed
constexpr long ITEM = 16 * 1024;      // bytes of the weight that a thread takes at a time
constexpr int LANES = 2;              // sums side by side, for an addition takes 4 cycles

// x as the sums read it. With bfloat16 dot products it stays as it is; else even and odd columns, in float32, so that
// a pair of weights in one word needs only a shift and a mask.
#if defined(__AVX512BF16__)
typedef __m512bh Pairs;
inline Pairs pairs_of(const bf16* p) { return as<Pairs>(_mm512_loadu_si512(p)); }
inline vec dot(vec sums, Pairs w, Pairs x) { return as<vec>(_mm512_dpbf16_ps(as<__m512>(sums), w, x)); }
#else
struct Pairs {
    vec even, odd;
};
inline Pairs pairs_of(const bf16* p) {
    uvec words;
    memcpy(&words, p, sizeof words);
    return {as<vec>(words << 16), as<vec>(words & 0xffff0000u)};
}
inline vec dot(vec sums, Pairs w, Pairs x) { return sums + w.even * x.even + w.odd * x.odd; }
#endif

inline Pairs part_of(const bf16* p, long count) {
    bf16 full[2 * PAIRS] = {};
    memcpy(full, p, count * sizeof(bf16));
    return pairs_of(full);
}

// One row of the weight against R rows of x, each summed in the same order whatever R is: a text's numbers must not
// depend on who is decoded beside it.
template <int R> void row(const bf16* w, const bf16* x, long x_row, long columns, float* out) {
    constexpr long STEP = 2 * PAIRS * LANES;
    vec sums[R][LANES] = {};
    long i = 0;
    for (; i + STEP <= columns; i += STEP)
        for (int l = 0; l < LANES; l++) {
            const long at = i + l * 2 * PAIRS;
            __builtin_prefetch((const char*)(w + at) + AHEAD);
            const Pairs weight = pairs_of(w + at);
            for (int r = 0; r < R; r++) sums[r][l] = dot(sums[r][l], weight, pairs_of(x + r * x_row + at));
        }
    for (; i < columns; i += 2 * PAIRS) {
        const long count = columns - i < 2 * PAIRS ? columns - i : 2 * PAIRS;
        const Pairs weight = part_of(w + i, count);
        for (int r = 0; r < R; r++) sums[r][0] = dot(sums[r][0], weight, part_of(x + r * x_row + i, count));
    }
    for (int r = 0; r < R; r++) {
        vec all = sums[r][0];
        for (int l = 1; l < LANES; l++) all += sums[r][l];
        out[r] = sum(all);
    }
}

struct Product {
    const bf16 *w, *x, *bias;
    long w_row, x_row, outputs, columns;
    void* y;
    bool low;  // y is bfloat16

    template <int R> void run(long first, int threads) const {
        const long each = ITEM / (columns * 2) + 1;
        const bf16* in = x + first * x_row;
        parallel(threads_for(threads, outputs * columns), (outputs + each - 1) / each, [&](long item, int) {
            const long end = (item + 1) * each < outputs ? (item + 1) * each : outputs;
            for (long o = item * each; o < end; o++) {
                float out[R];
                row<R>(w + o * w_row, in, x_row, columns, out);
                const float more = bias ? get(bias, o) : 0.0f;
                for (int r = 0; r < R; r++) {
                    const long at = (first + r) * outputs + o;
                    low ? put((bf16*)y + at, out[r] + more) : put((float*)y + at, out[r] + more);
                }
            }
        });
    }
};

}  // namespace

// y (B, O) = x (B, I) weight (O, I) transposed + bias (O,), if there is one; out: the dtype of y, 0 float32, 1 bfloat16.
API void matvec_bf16(int out, const void* w, long w_row, const void* x, long x_row, const void* bias, void* y,
                     long batch, long outputs, long columns, int threads) {
    const Product p{(const bf16*)w, (const bf16*)x, (const bf16*)bias, w_row, x_row, outputs, columns, y, out != 0};
    for (long first = 0; first < batch; first += 8) switch (batch - first) {
            case 1: p.run<1>(first, threads); break;
            case 2: p.run<2>(first, threads); break;
            case 3: p.run<3>(first, threads); break;
            case 4: p.run<4>(first, threads); break;
            case 5: p.run<5>(first, threads); break;
            case 6: p.run<6>(first, threads); break;
            case 7: p.run<7>(first, threads); break;
            default: p.run<8>(first, threads);
        }
}
