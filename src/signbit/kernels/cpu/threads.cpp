// One pool of threads with torch.
//
// torch keeps as many threads as it computes with, and after a parallel section they spin for a while in expectation
// of the next one. A second pool would compete with them for the cores just when a product follows an activation
// function. So the work is given to the very threads that torch uses: torch is built with OpenMP, and every OpenMP
// runtime on Linux (GNU's, LLVM's and Intel's) starts a parallel section through GOMP_parallel. It is looked up at run
// time, among what libtorch_cpu was linked with, because another runtime may be loaded beside it; nothing here depends
// on torch at build time.
//
// Where it is not found (macOS, or no torch), a small pool of our own does the work. So it does in a process that was
// forked: its threads stayed behind in the parent, and OpenMP runtimes wait for them forever.

#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <thread>

#ifdef __linux__
#include <dlfcn.h>
#include <link.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

namespace kernels {
namespace {

// Tasks, shared out in stretches: whoever comes takes a stretch of its own from end to end, since what a task fetches
// ahead belongs to the next one, and then helps with those of others.
class Job {
   public:
    Job(TaskFunction function, int64_t tasks, int threads)
        : function_(function), stretches_(std::min<int64_t>({threads, tasks, kMostStretches})) {
        for (int64_t i = 0; i < stretches_; i++) {
            stretch_[i].next.store(tasks * i / stretches_, std::memory_order_relaxed);
            stretch_[i].end = tasks * (i + 1) / stretches_;
        }
    }
    // What a task throws is kept, as it may not leave a thread or go past the others' work.
    void run() noexcept {
        const int64_t own = taken_.fetch_add(1, std::memory_order_relaxed);
        for (int64_t i = 0; i < stretches_; i++) {
            Stretch& from = stretch_[(own + i) % stretches_];
            for (int64_t task; (task = from.next.fetch_add(1, std::memory_order_relaxed)) < from.end;) {
                try {
                    function_(task);
                } catch (...) {
                    if (!failed_.exchange(true)) failure_ = std::current_exception();
                }
            }
        }
    }
    // When all threads are through.
    void rethrow() const {
        if (failed_.load()) std::rethrow_exception(failure_);
    }

   private:
    static constexpr int64_t kMostStretches = 64;
    struct alignas(64) Stretch {
        std::atomic<int64_t> next;
        int64_t end;
    };

    TaskFunction function_;
    int64_t stretches_;
    std::atomic<int64_t> taken_{0};
    std::atomic<bool> failed_{false};
    std::exception_ptr failure_;
    Stretch stretch_[kMostStretches];
};

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Threads that wait for jobs: spinning for some 20 microseconds, which is as long as it takes to be woken, then asleep.
class Pool {
   public:
    void run(Job& job, int threads) {
        std::unique_lock<std::mutex> only(one_at_a_time_, std::try_to_lock);
        if (only) {
            grow(threads - 1);
            helpers_.store(threads - 1, std::memory_order_relaxed);
            job_.store(&job);
            {
                std::lock_guard<std::mutex> lock(sleep_);
                generation_.fetch_add(1);
            }
            wake_.notify_all();
        }
        job.run();  // alone if the pool works for another Python thread
        if (only) {
            // Whoever comes now finds no job; whoever is inside has seen this one and finishes it.
            job_.store(nullptr);
            while (inside_.load() != 0) relax();
        }
    }

   private:
    static constexpr int kSpins = 500;

    void grow(int helpers) {
        for (; started_ < helpers; started_++) {
            const uint64_t seen = generation_.load();
            std::thread([this, number = started_, seen] { serve(number, seen); }).detach();
        }
    }

    void serve(int number, uint64_t seen) {
        for (;;) {
            for (int spin = 0; spin < kSpins && generation_.load() == seen; spin++) relax();
            if (generation_.load() == seen) {
                std::unique_lock<std::mutex> lock(sleep_);
                wake_.wait(lock, [&] { return generation_.load() != seen; });
            }
            seen = generation_.load();
            inside_.fetch_add(1);
            Job* job = job_.load();
            if (job && number < helpers_.load(std::memory_order_relaxed)) job->run();
            inside_.fetch_sub(1);
        }
    }

    std::mutex one_at_a_time_, sleep_;
    std::condition_variable wake_;
    std::atomic<uint64_t> generation_{0};
    std::atomic<Job*> job_{nullptr};
    std::atomic<int> inside_{0}, helpers_{0};
    int started_ = 0;
};

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The function by which torch starts its own parallel sections; null where there is none.
Parallel find_torchs_parallel() {
#ifdef __linux__
    std::string torch;
    dl_iterate_phdr(
        [](dl_phdr_info* library, size_t, void* found) {
            if (!std::strstr(library->dlpi_name, "libtorch_cpu.so")) return 0;
            *static_cast<std::string*>(found) = library->dlpi_name;
            return 1;
        },
        &torch);
    if (torch.empty()) return nullptr;
    // Python loads it with its symbols hidden from everybody else; a handle of it finds those of its dependencies too.
    void* handle = dlopen(torch.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    return handle ? reinterpret_cast<Parallel>(dlsym(handle, "GOMP_parallel")) : nullptr;
#else
    return nullptr;
#endif
}

// Never freed: its threads may outlive main().
std::atomic<Pool*> own_pool{nullptr};
std::atomic<bool> forked{false};

Pool& pool() {
    Pool* pool = own_pool.load();
    if (!pool) {
        Pool* made = new Pool;
        if (own_pool.compare_exchange_strong(pool, made)) return *made;
        delete made;  // another thread was faster
    }
    return *pool;
}

#ifndef _WIN32
// When the library is loaded, since it may be a parallel section of torch's that the parent has had.
[[maybe_unused]] const int watching_forks = pthread_atfork(nullptr, nullptr, [] {
    forked.store(true);
    own_pool.store(nullptr);  // left to the parent: its locks may be held by threads that are not here
});
#endif

Parallel torchs_parallel() {
    static const Parallel found = find_torchs_parallel();
    return forked.load(std::memory_order_relaxed) ? nullptr : found;
}

}  // namespace

void parallel_for(int64_t tasks, int threads, TaskFunction function) {
    if (threads <= 1 || tasks <= 1) {
        for (int64_t task = 0; task < tasks; task++) function(task);
        return;
    }
    Job job(function, tasks, threads);
    if (const Parallel parallel = torchs_parallel()) {
        // As many as torch has even if there are fewer tasks: a smaller section would end the threads left over.
        parallel([](void* job) { static_cast<Job*>(job)->run(); }, &job, static_cast<unsigned>(threads), 0);
    } else {
        pool().run(job, static_cast<int>(std::min<int64_t>(threads, tasks)));
    }
    job.rethrow();
}

const char* thread_pool() { return torchs_parallel() ? "torch" : "own"; }

}  // namespace kernels
