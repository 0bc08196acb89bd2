// Attention of single queries over keys and values in pages, as in decoding.
// Shape letters: S queries, H query heads, K KV heads, P head dim, T tokens of a page.
#pragma once
#include "vec.h"

// Keys or values of one block, bfloat16. Strides in numbers; those of a head lie together.
struct Pages {
    bf16* data;
    long page, token, head;
    bf16* at(const int32_t* table, long size, long position, long kv_head) const {
        return data + table[position / size] * page + position % size * token + kv_head * head;
    }

    // f(i, numbers of a head) for `count` positions from `begin` on: divisions are slow, so one a page.
    template <class F> void each(const int32_t* table, long size, long begin, long count, long kv_head, F f) const {
        for (long i = 0; i < count;) {
            const long in_page = (begin + i) % size, left = size - in_page;
            const bf16* from = at(table, size, begin + i, kv_head);
            for (const long end = i + left < count ? i + left : count; i < end; i++, from += token) f(i, from);
        }
    }
};

struct Queries {
    const float* q;         // (S, H, P)
    float* out;             // (S, H, P)
    const int32_t* tables;  // (S, table_row): the pages of each query's sequence
    const int32_t* lengths; // (S,): tokens that a query sees, itself the last
    long table_row, size;   // size: T
    long count, heads, kv_heads, dim;
    long window;  // the last so many of them; 0: all
};

void attend(const Queries& queries, const Pages& keys, const Pages& values, int threads);
