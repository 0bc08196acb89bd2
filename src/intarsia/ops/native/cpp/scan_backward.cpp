// The scan of Mamba-2, backward: the states before every chunk are made again, then chunks are taken from the last to
// the first. Nothing else is kept: what is (Q, Q) lives in the cache and is gone with its chunk.
#include <vector>

#include "scan.h"

namespace {

constexpr long TASKS = 8;  // not of the number of threads: the gradients of b and c are sums over a group's parts

struct Outputs {
    const void* dy;     // (B, L, H, P), contiguous
    const float* last;  // (B, H, P, N): the gradient of the last state
    void* x;            // (B, L, H, P)
    float *dt, *a, *d;  // (B, L, H); (B, G, H / G) twice, a sum for every row of the batch
    float *b, *c;       // (parts, B, L, G, N)
    float* state;       // (B, H, P, N)
};

// One head in a chunk, and what its chunk's heads add up to.
template <class E, class T> class Head {
    typedef typename E::low low;
    const Scan& s;
    const Chunk<E>& chunk;
    const long size, width;
    Decays decays;
    float ones[Q], ended[Q];                     // ended: what of a token's x B is left in the state after the chunk
    float *reach;                                // (rows, rows): decays from token j to token i
    low *weights, *weights_right, *weights_turned;
    low *x, *x_turned, *x_ended, *x_ended_turned, *x_ended_right;
    low *dy, *dy_right, *dy_decayed, *dy_decayed_turned, *dy_decayed_right;
    low *state_left, *state_right, *after_left, *after_right;
    float *pairs, *across, *from_end, *dx;
    float scores_time[Q], through[Q];            // gradients of dt by the scores, of the decays' logarithms

   public:
    float *dscores, *db, *dc;  // (rows, rows); (N, rows) twice, transposed

    Head(const Scan& s, const Chunk<E>& chunk, Room& room)
        : s(s), chunk(chunk), size(s.padded_size()), width(s.padded_width()) {
        for (float** m : {&reach, &pairs, &dscores}) *m = room.take<float>(Q * Q);
        for (low** m : {&weights, &weights_right, &weights_turned}) *m = room.take<low>(Q * Q);
        for (low** m : {&x, &x_turned, &x_ended, &x_ended_turned, &x_ended_right, &dy, &dy_right, &dy_decayed,
                        &dy_decayed_turned, &dy_decayed_right}) {
            *m = room.take<low>(Q * size);
            memset((void*)*m, 0, Q * size * sizeof(low));  // columns beyond P stay so
        }
        for (low** m : {&state_left, &state_right, &after_left, &after_right}) *m = room.take<low>(width * size);
        for (float** m : {&across, &from_end, &dx}) *m = room.take<float>(Q * size);
        for (float** m : {&db, &dc}) *m = room.take<float>(Q * width);
        for (float& one : ones) one = 1;
    }

    static long bytes(long size, long width) {
        return 64 * 64 + (6 * Q * Q + 13 * Q * size + 4 * width * size + 2 * Q * width) * 4;
    }

    // Only the state: from before the chunk to behind it.
    void advance(long batch, long h, float* state) {
        set_time(batch, h);
        put_tokens<E>(x_ended_right, size, inputs(batch, h), s.x_row, s.size, chunk.tokens, chunk.rows, ended);
        const vec left = broadcast(decays.from_start[chunk.rows - 1]);
        for (long i = 0; i < width * size; i += W) store(state + i, load(state + i) * left);
        E::product(width, size, chunk.rows, chunk.b_turned, chunk.rows, x_ended_right, size, state, size, true);
    }

    // The gradients of head h; from that of the state behind the chunk, `after` (N, P), to that of `state` before it.
    void run(long batch, long h, const float* state, float* after, const Outputs& out) {
        const long rows = chunk.rows, at = (batch * s.length + chunk.first) * s.heads + h;
        const T* outgoing = (const T*)out.dy + at * s.size;
        set_time(batch, h);
        set_tokens(inputs(batch, h), outgoing);
        set_weights();
        const float last = decays.from_start[rows - 1], kept = last * set_states(state, after, last);
        E::product(rows, size, width, chunk.c, width, state_right, size, across, size, false);
        E::product(rows, size, width, chunk.b, width, after_right, size, from_end, size, false);
        for (long i = 0; i < rows; i += 32) {
            E::product(32, i + 32, size, dy + i * size, size, x_turned, rows, pairs + i * rows, rows, false);
            E::product(32, size, rows - i, weights_turned + i * rows + i, rows, dy_right + i * size, size,
                       dx + i * size, size, false);
        }
        E::product(width, rows, size, state_left, size, dy_decayed_turned, rows, dc, rows, true);
        E::product(width, rows, size, after_left, size, x_ended_turned, rows, db, rows, true);
        E::product(width, size, rows, chunk.c_turned, rows, dy_decayed_right, size, after, size, true);
        go_through_pairs();
        write(inputs(batch, h), outgoing, batch, h, kept, out);
    }

   private:
    const T* inputs(long batch, long h) const {
        return (const T*)s.x + batch * s.x_batch + chunk.first * s.x_row + h * s.size;
    }

    void set_time(long batch, long h) {
        decays.set(s, chunk, batch, h);
        for (long j = 0; j < chunk.rows; j++) ended[j] = decays.time[j] * decays.to_end[j];
    }

    // x and dy in every shape that the products read, plain and with the decays of the state before or after.
    void set_tokens(const T* in, const T* outgoing) {
        const long rows = chunk.rows, tokens = chunk.tokens, out_row = s.heads * s.size;
        copy(x, in, s.x_row, ones), copy(x_ended, in, s.x_row, ended);
        copy(dy, outgoing, out_row, ones), copy(dy_decayed, outgoing, out_row, decays.from_start);
        E::turn_right(x, x_turned, rows, size), E::turn_right(x_ended, x_ended_turned, rows, size);
        E::turn_right(dy_decayed, dy_decayed_turned, rows, size);
        put_tokens<E>(dy_right, size, outgoing, out_row, s.size, tokens, rows, ones);
        put_tokens<E>(dy_decayed_right, size, outgoing, out_row, s.size, tokens, rows, decays.from_start);
    }

    void copy(low* to, const T* from, long from_row, const float* factor) const {
        for (long i = 0; i < chunk.rows; i++)
            each_vec(s.size, [&](long c, auto n) {
                store(to + i * size + c, i < chunk.tokens ? load(from + i * from_row + c, n) * factor[i] : vec{});
            });
    }

    void set_weights() {
        const long rows = chunk.rows;
        decays.each_pair(rows, [&](long i, long j, vec left) {
            const long at = i * rows + j;
            store(reach + at, left);
            store(weights + at, left * load(decays.time + j) * load(chunk.scores + at));
        });
        E::turn_right(weights, weights_right, rows, rows);
        E::turn_left(weights_right, weights_turned, rows, rows);
    }

    // Both states as the products read them; `after` becomes what the chunk's decays pass on of it. Returns their
    // inner product.
    float set_states(const float* state, float* after, float last) {
        vec product{};
        for (long n = 0; n < width; n += 2)
            for (long c = 0; c < size; c += W) {
                const long even = n * size + c, odd = even + size;
                const vec se = load(state + even), so = load(state + odd), ae = load(after + even), ao = load(after + odd);
                E::put_pair(state_right, size, n, c, se, so), E::put_pair(after_right, size, n, c, ae, ao);
                store(state_left + even, se), store(state_left + odd, so);
                store(after_left + even, ae), store(after_left + odd, ao);
                store(after + even, ae * last), store(after + odd, ao * last);
                product += se * ae + so * ao;
            }
        return sum(product);
    }

    // From `pairs`, dy_i . x_j: the gradients of the scores, of dt in them, and of every token's decay.
    //
    // What flows from j to i passes the decays of j + 1 to i. Those of token k get the sum over i >= k > j, taken as
    // it stands: column sums of the rows from k on, summed over the columns before k.
    void go_through_pairs() {
        const long rows = chunk.rows;
        vec of_time[Q / W] = {}, below[Q / W] = {}, place[Q / W];
        for (long j = 0; j < rows; j++) place[j / W][j % W] = float(j);
        for (long i = rows - 1; i >= 0; i--) {
            vec sums{};
            for (long v = 0; v <= i / W; v++) {
                const long at = i * rows + v * W;
                const vec time = load(decays.time + v * W);
                const vec flow = load(pairs + at) * load(reach + at), by_time = flow * load(chunk.scores + at);
                const vec inside = select(place[v] <= float(i), by_time, vec{});
                store(dscores + at, load(dscores + at) + select(place[v] <= float(i), flow * time, vec{}));
                of_time[v] += inside;
                below[v] += inside * time;
                sums += select(place[v] < float(i), below[v], vec{});
            }
            through[i] = sum(sums);
        }
        for (long v = 0; v < rows / W; v++) store(scores_time + v * W, of_time[v]);
    }

    void write(const T* in, const T* outgoing, long batch, long h, float kept, const Outputs& out) {
        const float d = s.d ? s.d[h] : 0.0f;
        const long at = (batch * s.length + chunk.first) * s.heads + h;
        float read[Q], given[Q], dd = 0, da = 0;  // gradients by the state before, and by that behind the chunk
        for (long i = 0; i < chunk.tokens; i++) {
            vec by_state{}, by_end{}, direct{};
            each_vec(s.size, [&](long c, auto n) {
                const vec v = load(in + i * s.x_row + c, n), g = load(outgoing + i * s.heads * s.size + c, n);
                const vec end = load(from_end + i * size + c);
                by_state += g * load(across + i * size + c), by_end += v * end, direct += v * g;
                store((T*)out.x + (at + i * s.heads) * s.size + c, load(dx + i * size + c) + end * ended[i] + g * d, n);
            });
            read[i] = sum(by_state) * decays.from_start[i], given[i] = sum(by_end) * decays.to_end[i];
            dd += sum(direct);
        }
        float later = 0, earlier = 0;
        for (long i = chunk.tokens - 1; i >= 0; i--) through[i] += later += read[i];
        for (long i = 0; i < chunk.tokens; i++) {
            const float decay = through[i] + earlier + kept;  // the gradient of dt A
            earlier += given[i] * decays.time[i];
            out.dt[at + i * s.heads] = scores_time[i] + given[i] + decay * s.a[h];
            da += decay * decays.time[i];
        }
        out.a[batch * s.heads + h] += da, out.d[batch * s.heads + h] += dd;
    }
};

template <class E, class T> class PartBackward {
    typedef typename E::low low;
    const Scan& s;
    const Share& part;
    const Outputs& out;
    const long size = s.padded_size(), width = s.padded_width(), state_size = size * width;
    float *after, *turned;
    low *dscores, *dscores_right;
    Chunk<E> chunk;
    Head<E, T> head;

   public:
    PartBackward(const Scan& s, const Share& part, const Outputs& out, Room room)
        : s(s), part(part), out(out), after(room.take<float>(part.count * state_size)),
          turned(room.take<float>(Q * width)), dscores(room.take<low>(Q * Q)), dscores_right(room.take<low>(Q * Q)),
          chunk(s, room), head(s, chunk, room) {}

    static long bytes(const Scan& s, long heads) {
        const long size = s.padded_size(), width = s.padded_width();
        return 64 * 64 + (heads * size * width + 7 * Q * width + 3 * Q * Q) * 4 + Head<E, T>::bytes(size, width);
    }

    void run() {
        const long chunks = (s.length + Q - 1) / Q, each = part.count * state_size;
        std::vector<float> states(chunks * each);  // before every chunk
        turn_states(s.state, states.data());
        for (long k = 0; k + 1 < chunks; k++) {
            float* next = states.data() + (k + 1) * each;
            memcpy(next, next - each, each * sizeof(float));
            chunk.template set<T>(s, part.batch, part.group, k * Q);
            for (long h = 0; h < part.count; h++) head.advance(part.batch, part.first + h, next + h * state_size);
        }
        memset(after, 0, each * sizeof(float));
        turn_states(out.last, after);
        for (long k = chunks - 1; k >= 0; k--) chunk_backward(k, states.data() + k * each);
        for (long h = 0; h < part.count; h++)
            transpose(after + h * state_size, size, out.state + state_at(h), s.width, s.width, s.size);
    }

   private:
    long state_at(long h) const { return (part.batch * s.heads + part.first + h) * s.size * s.width; }

    void turn_states(const float* from, float* to) const {
        for (long h = 0; h < part.count && from; h++)
            transpose(from + state_at(h), s.width, to + h * state_size, size, s.size, s.width);
    }

    void chunk_backward(long k, const float* states) {
        chunk.template set<T>(s, part.batch, part.group, k * Q, true);
        const long rows = chunk.rows;
        memset(head.dscores, 0, rows * rows * sizeof(float));
        memset(head.db, 0, rows * width * sizeof(float)), memset(head.dc, 0, rows * width * sizeof(float));
        for (long h = 0; h < part.count; h++)
            head.run(part.batch, part.first + h, states + h * state_size, after + h * state_size, out);
        for (long i = 0; i < rows * rows; i += W) store(dscores + i, load(head.dscores + i));
        E::turn_right(dscores, dscores_right, rows, rows);
        E::product(width, rows, rows, chunk.b_turned, rows, dscores_right, rows, head.dc, rows, true);
        for (long i = 0; i < rows; i += 2)
            for (long j = 0; j < rows; j += W)
                E::put_pair(dscores_right, rows, i, j, load(head.dscores + i * rows + j), load(head.dscores + (i + 1) * rows + j));
        E::product(width, rows, rows, chunk.c_turned, rows, dscores_right, rows, head.db, rows, true);
        write(head.db, out.b), write(head.dc, out.c);
    }

    // (N, rows) -> its tokens' places in (parts, B, L, G, N).
    void write(const float* gradient, float* all) {
        transpose(gradient, chunk.rows, turned, width, width, chunk.rows);
        float* to = all + (((part.index * s.batch + part.batch) * s.length + chunk.first) * s.groups + part.group) * s.width;
        for (long i = 0; i < chunk.tokens; i++)
            memcpy(to + i * s.groups * s.width, turned + i * width, s.width * sizeof(float));
    }
};

template <class E, class T, class Engine> void backward(const Scan& s, const Outputs& out, int threads) {
    each_part(s, parts_of(s, TASKS), threads, [&](const Share& part) {
        Engine ready;
        FlushTiny flush;
        PartBackward<E, T>(s, part, out, Room{(char*)scratch(PartBackward<E, T>::bytes(s, part.count))}).run();
    });
}

}  // namespace

// Into how many parts `ssd_backward` divides a group's heads.
API long ssd_parts(long batch, long heads, long groups) {
    Scan s{};
    s.batch = batch, s.heads = heads, s.groups = groups;
    return parts_of(s, TASKS);
}

// As ssd_forward, and: dy (B, L, H, P) contiguous; dlast and dstate (B, H, P, N); dx (B, L, H, P); ddt (B, L, H); da and
// dd (B, H) zeros, to be summed; db and dc (parts, B, L, G, N), to be summed.
API void ssd_backward(int data, const void* x, long x_batch, long x_row, const void* b, long b_batch, long b_row,
                      const void* c, long c_batch, long c_row, const float* dt, const float* a, const float* d,
                      const float* state, const int32_t* segments, const void* dy, const float* dlast, void* dx,
                      float* ddt, float* da, float* dd, float* db, float* dc, float* dstate, long batch, long length,
                      long heads, long size, long groups, long width, int threads) {
    Scan s{x,  b, c, x_batch, x_row,    b_batch, b_row, c_batch, c_row, dt, a,
           d,  state, segments, batch, length, heads, size, groups, width};
    Outputs out{dy, dlast, dx, ddt, da, dd, db, dc, dstate};
    if (!data) return backward<FloatEngine, float, Nothing>(s, out, threads);
    backward<LowEngine, bf16, LowReady>(s, out, threads);
}
