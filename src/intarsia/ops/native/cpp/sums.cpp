// Sums over rows, in the order of the rows: the same bits whatever the number of threads.
#include <algorithm>

#include "pool.h"
#include "vec.h"

namespace {

constexpr long STRIP = 1024;  // columns of one task: their sums stay in the first-level cache

}  // namespace

// rows (count, columns), total (columns).
API void sum_rows(const float* rows, float* total, long count, long columns, int threads) {
    parallel(threads_for(threads, count * columns), (columns + STRIP - 1) / STRIP, [&](long strip, int) {
        const long first = strip * STRIP, width = std::min(STRIP, columns - first);
        std::fill(total + first, total + first + width, 0.0f);
        for (long row = 0; row < count; row++) {
            const float* from = rows + row * columns + first;
            float* to = total + first;
            each_vec(width, [&](long c, auto n) { store(to + c, load(to + c, n) + load(from + c, n), n); });
        }
    });
}
