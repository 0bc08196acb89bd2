// Our own threads: as many as the caller asks for, started once, asleep between calls. Or OpenMP's, where its threads
// would keep ours from their cores.
#pragma once
#include <cstddef>

// task(item, worker) for every item of [0, items), on up to `threads` threads, numbered from 0.
// With one thread, or while another call uses the threads, the caller does it all.
typedef void (*Task)(void* context, long item, int worker);
void parallel(int threads, long items, Task task, void* context);

template <class F> void parallel(int threads, long items, F f) {
    parallel(threads, items, [](void* context, long item, int worker) { (*(F*)context)(item, worker); }, &f);
}

// Memory of this thread, aligned to a cache line, that stays for the next call; what was in it is lost.
void* scratch(size_t bytes);

struct Room {  // a piece of scratch memory, given out in lines of the cache
    char* at;
    template <class T> T* take(long count) {
        T* here = (T*)at;
        at += (count * sizeof(T) + 63) / 64 * 64;
        return here;
    }
};

// How many threads are worth waking for so many numbers.
inline int threads_for(int threads, long numbers) {
    long useful = numbers / 16384 + 1;
    return useful < threads ? int(useful) : threads;
}
