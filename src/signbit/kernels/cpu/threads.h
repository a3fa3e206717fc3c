// Sharing work out between threads.

#pragma once

#include <cstdint>

namespace kernels {

// A function of the task's number, which lives elsewhere. It must not throw.
class TaskFunction {
   public:
    template <class F>
    TaskFunction(const F& function)  // NOLINT(google-explicit-constructor): made from a lambda in the call
        : function_(&function), call_([](const void* f, int64_t task) { (*static_cast<const F*>(f))(task); }) {}

    void operator()(int64_t task) const { call_(function_, task); }

   private:
    const void* function_;
    void (*call_)(const void*, int64_t);
};

// Calls function(0) .. function(tasks - 1), each once, with the calling thread and up to threads - 1 others: each a stretch
// of neighbours, and then what nobody has of others' stretches. Returns when all are done.
void parallel_for(int64_t tasks, int threads, TaskFunction function);

// "torch" or "own": whose threads do the work.
const char* thread_pool();

}  // namespace kernels
