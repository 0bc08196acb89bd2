// The scan of Mamba-2, forward: chunks of matrix products, everything of a chunk in the cache (arXiv 2405.21060, 6).
#include "scan.h"

namespace {

// One head in a chunk.
template <class E, class T> class Head {
    typedef typename E::low low;
    const Scan& s;
    const Chunk<E>& chunk;
    const long size, width;
    Decays decays;
    low *weights, *x_right, *x_ended, *state_right;
    float *inside, *across;

   public:
    Head(const Scan& s, const Chunk<E>& chunk, Room& room)
        : s(s), chunk(chunk), size(s.padded_size()), width(s.padded_width()) {
        weights = room.take<low>(Q * Q);
        x_right = room.take<low>(Q * size), x_ended = room.take<low>(Q * size);
        state_right = room.take<low>(width * size);
        inside = room.take<float>(Q * size), across = room.take<float>(Q * size);
        memset((void*)x_right, 0, Q * size * sizeof(low));  // columns beyond P stay so
        memset((void*)x_ended, 0, Q * size * sizeof(low));
    }

    // Write y of head h. `state` (N, P) moves on to before this chunk, from the chunk before: state left + gain; and
    // `left` and `gain` are set to what this chunk leaves and adds.
    void run(long batch, long h, float* state, float& left, float* gain, void* all_y) {
        const T* x = (const T*)s.x + batch * s.x_batch + chunk.first * s.x_row + h * s.size;
        T* y = (T*)all_y + ((batch * s.length + chunk.first) * s.heads + h) * s.size;
        const long rows = chunk.rows;
        decays.set(s, chunk, batch, h);
        decays.each_pair(rows, [&](long i, long j, vec left) {
            const long at = i * rows + j;
            store(weights + at, left * load(decays.time + j) * load(chunk.scores + at));
        });
        set_inputs(x);
        catch_up(state, left, gain);
        left = decays.from_start[rows - 1];
        E::product(rows, size, width, chunk.c, width, state_right, size, across, size, false);
        for (long i = 0; i < rows; i += 32)
            E::product(32, size, i + 32, weights + i * rows, rows, x_right, size, inside + i * size, size, false);
        E::product(width, size, rows, chunk.b_turned, rows, x_ended, size, gain, size, false);
        write(x, y, s.d ? s.d[h] : 0.0f);
    }

   private:
    // x as it is, and as the state behind the chunk gets it.
    void set_inputs(const T* x) {
        for (long j = 0; j < chunk.rows; j += 2, x += 2 * s.x_row) {
            const float even_ended = decays.time[j] * decays.to_end[j];
            const float odd_ended = decays.time[j + 1] * decays.to_end[j + 1];
            fetch(x + Q * s.x_row, s.size), fetch(x + (Q + 1) * s.x_row, s.size);
            each_vec(s.size, [&](long c, auto n) {
                vec even = j < chunk.tokens ? load(x + c, n) : vec{};
                vec odd = j + 1 < chunk.tokens ? load(x + s.x_row + c, n) : vec{};
                E::put_pair(x_right, size, j, c, even, odd);
                E::put_pair(x_ended, size, j, c, even * even_ended, odd * odd_ended);
            });
        }
    }

    void catch_up(float* state, float left, const float* gain) {
        for (long n = 0; n < width; n += 2)
            for (long c = 0; c < size; c += W) {
                const long even = n * size + c, odd = even + size;
                vec e = load(state + even) * left + load(gain + even), o = load(state + odd) * left + load(gain + odd);
                E::put_pair(state_right, size, n, c, e, o);
                store(state + even, e), store(state + odd, o);
            }
    }

    void write(const T* x, T* y, float d) const {
        for (long i = 0; i < chunk.tokens; i++)
            each_vec(s.size, [&](long c, auto n) {
                vec v = load(inside + i * size + c) + decays.from_start[i] * load(across + i * size + c);
                store(y + i * s.heads * s.size + c, v + d * load(x + i * s.x_row + c, n), n);
            });
    }
};

template <class E, class T> void scan_part(const Scan& s, const Share& part, void* y, float* last) {
    FlushTiny flush;
    const long size = s.padded_size(), width = s.padded_width(), count = part.count;
    const long state = s.size * s.width, padded = size * width;
    Room room{(char*)scratch(64 * 1024 + ((2 * count + 1) * padded + 6 * Q * width + 4 * Q * size) * 4)};
    float *states = room.take<float>(count * padded), *gains = room.take<float>(count * padded);
    Chunk<E> chunk(s, room);
    Head<E, T> head(s, chunk, room);
    float left[HEADS] = {};
    memset(states, 0, count * padded * sizeof(float)), memset(gains, 0, count * padded * sizeof(float));
    const long at = (part.batch * s.heads + part.first) * state;
    for (long h = 0; h < count && s.state; h++)  // the first chunk catches up to the initial state
        transpose(s.state + at + h * state, s.width, gains + h * padded, size, s.size, s.width);
    for (long first = 0; first < s.length; first += Q) {
        chunk.template set<T>(s, part.batch, part.group, first);
        for (long h = 0; h < count; h++)
            head.run(part.batch, part.first + h, states + h * padded, left[h], gains + h * padded, y);
    }
    for (long h = 0; h < count; h++) {
        float *mine = states + h * padded, *gain = gains + h * padded;
        for (long i = 0; i < padded; i += W) store(mine + i, load(mine + i) * left[h] + load(gain + i));
        transpose(mine, size, last + at + h * state, s.width, s.width, s.size);
    }
}

template <class E, class T, class Engine> void scan(const Scan& s, void* y, float* last, int threads) {
    each_part(s, parts_of(s, 2 * threads), threads, [&](const Share& part) {
        Engine ready;
        scan_part<E, T>(s, part, y, last);
    });
}

}  // namespace

// data: the dtype of x, b, c and y, 0 float32 and 1 bfloat16. y (B, L, H, P), last (B, H, P, N).
API void ssd_forward(int data, const void* x, long x_batch, long x_row, const void* b, long b_batch, long b_row,
                     const void* c, long c_batch, long c_row, const float* dt, const float* a, const float* d,
                     const float* state, const int32_t* segments, void* y, float* last, long batch, long length,
                     long heads, long size, long groups, long width, int threads) {
    Scan s{x,  b, c, x_batch, x_row,    b_batch, b_row, c_batch, c_row, dt, a,
           d,  state, segments, batch, length, heads, size, groups, width};
    if (!data) return scan<FloatEngine, float, Nothing>(s, y, last, threads);
    scan<LowEngine, bf16, LowReady>(s, y, last, threads);
}
