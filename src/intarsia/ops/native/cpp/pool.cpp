#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace {

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
   public:
    void run(int threads, long items, Task task, void* context) {
        std::unique_lock<std::mutex> mine(in_use_, std::try_to_lock);
        if (!mine.owns_lock()) {
            for (long i = 0; i < items; i++) task(context, i, 0);
            return;
        }
        {
            std::lock_guard<std::mutex> lock(mutex_);
            task_ = task, context_ = context, items_ = items, next_ = 0;
            taken_ = 1, seats_ = threads;
            start_missing(threads - 1);
            call_++;
        }
        wake_.notify_all();
        work(0);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            seats_ = 0;  // who wakes now is too late, and nobody waits for them
        }
        for (int spins = 0; busy_.load(std::memory_order_acquire);) {
            if (++spins < SPINS) pause();
            else std::this_thread::yield();
        }
    }

   private:
    static constexpr int SPINS = 1000;  // some 40 microseconds: calls of one layer follow each other that closely

    void start_missing(int wanted) {
        try {
            for (; started_ < wanted; started_++) std::thread([this, seen = call_.load()] { serve(seen); }).detach();
        } catch (const std::system_error&) {  // no more threads to be had: those there are do the work
        }
    }

    void serve(unsigned seen) {
        for (;;) {
            for (int spins = 0; call_.load(std::memory_order_acquire) == seen && spins < SPINS; spins++) pause();
            int seat;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return call_ != seen; });
                seen = call_;
                if (taken_ >= seats_) continue;
                seat = taken_++;
                busy_++;
            }
            work(seat);
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    void work(int worker) {
        for (long i; (i = next_.fetch_add(1)) < items_;) task_(context_, i, worker);
    }

    std::mutex in_use_, mutex_;
    std::condition_variable wake_;
    std::atomic<unsigned> call_{0};
    std::atomic<int> busy_{0};
    std::atomic<long> next_{0};
    Task task_ = nullptr;
    void* context_ = nullptr;
    long items_ = 0;
    int taken_ = 0, seats_ = 0, started_ = 0;
};

std::atomic<Pool*> pool{nullptr};  // never deleted: its threads live until the process ends

Pool& the_pool() {
    static std::once_flag once;
    std::call_once(once, [] {
#if defined(__unix__) || defined(__APPLE__)
        pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });  // a forked process has none of the threads
#endif
    });
    Pool* there = pool.load();
    if (!there) {
        Pool* fresh = new Pool;
        if (pool.compare_exchange_strong(there, fresh)) return *fresh;
        delete fresh;
    }
    return *pool.load();
}

// GNU OpenMP's call that runs `region(data)` on so many threads of its own, the caller among them.
typedef void (*Team)(void (*region)(void*), void* data, unsigned threads, unsigned flags);
Team team = nullptr;

struct Shared {
    Task task;
    void* context;
    long items;
    std::atomic<long> next{0};
    std::atomic<int> seats{0};

    static void region(void* data) {
        Shared& s = *(Shared*)data;
        const int worker = s.seats.fetch_add(1);
        for (long i; (i = s.next.fetch_add(1)) < s.items;) s.task(s.context, i, worker);
    }
};

struct Scratch {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Scratch() { free(memory); }
};

}  // namespace

void parallel(int threads, long items, Task task, void* context) {
    if (threads > items) threads = int(items);
    if (threads > 1 && team) {
        Shared shared{task, context, items};
        return team(Shared::region, &shared, threads, 0);
    }
    if (threads > 1) return the_pool().run(threads, items, task, context);
    for (long i = 0; i < items; i++) task(context, i, 0);
}

void* scratch(size_t bytes) {
    thread_local Scratch mine;
    if (bytes > mine.bytes) {
        free(mine.memory);
        mine.bytes = (bytes + 4095) / 4096 * 4096;
        mine.memory = aligned_alloc(64, mine.bytes);
    }
    return mine.memory;
}

// From now on run on OpenMP's threads (its GOMP_parallel), or, with null, on our own. A forked process has none of
// OpenMP's and would wait for them forever: there it is ours again.
extern "C" __attribute__((visibility("default"))) void intarsia_team(void* gomp_parallel) {
    team = (Team)gomp_parallel;
#if defined(__unix__) || defined(__APPLE__)
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { team = nullptr; }); });
#endif
}
