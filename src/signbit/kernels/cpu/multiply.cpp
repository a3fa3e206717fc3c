// The three steps of a product, for all layouts and instruction sets.

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "dots.h"
#include "floats.h"
#include "halfwords.h"
#include "threads.h"

namespace kernels {
namespace {

// Bytes of tables that are in use at a time: they are read again for every tile, and belong in the second-level cache.
constexpr int64_t kTableBytes = 1 << 20, kHalfwordTableBytes = 8 << 20;

// What is made of activations for all threads by one of them takes so much at most.
constexpr int64_t kSharedBytesPerColumn = 8;

// Tiles of a task: so many that a task is worth its start, so few that threads end together; layouts with strips of
// rows want a multiple of four.
constexpr int64_t kLeastTiles = 4, kMostTiles = 16, kTasksPerThread = 3;

int64_t rows_of_task(const Isa& isa, int64_t n, int threads) {
    const int64_t tiles = n / (isa.tile * kTasksPerThread * std::max(threads, 1));
    return isa.tile * std::clamp(tiles / kLeastTiles * kLeastTiles, kLeastTiles, kMostTiles);
}

// Memory of a thread that stays from one call to the next.
class Workspace {
   public:
    // Room for so many bytes, aligned to cache lines; what was there is lost.
    char* reserve(size_t bytes) {
        if (bytes > size_) {
            memory_.reset();
            size_ = 0;
            memory_ = allocate(bytes);
            size_ = bytes;
        }
        return memory_.get();
    }

   private:
    // From this on it is mapped: once a large block has been freed, glibc keeps blocks up to its size instead of giving
    // them back, which was 120 MB of a model of 7B that had read a prompt.
    static constexpr size_t kMapped = 1 << 20;

    struct Free {
        size_t mapped;  // bytes, or 0
        void operator()(char* memory) const {
            if (mapped) munmap(memory, mapped);
            else std::free(memory);
        }
    };
    using Memory = std::unique_ptr<char, Free>;

    static Memory allocate(size_t bytes) {
        if (bytes < kMapped) {
            char* memory = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
            if (!memory) throw std::bad_alloc();
            return Memory(memory, Free{0});
        }
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        return Memory(static_cast<char*>(memory), Free{bytes});
    }

    Memory memory_{nullptr, Free{0}};
    size_t size_ = 0;
};

// Hands out aligned pieces of a workspace; measures them first when it has none.
struct Pieces {
    char* base = nullptr;
    size_t used = 0;

    template <class T>
    T* take(int64_t count) {
        T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return piece;
    }
};

// What one token's activations of a kind take.
int64_t bytes_of(const Matrix& matrix, const Isa& isa, int64_t kind, bool int8) {
    const int64_t words = matrix.kind_words(kind);
    switch (matrix.form(kind)) {
        case Form::tables: return words * static_cast<int64_t>(isa.table_bytes[int8]);
        case Form::halfwords: return words * kHalfwordBytes[int8];
        case Form::numbers: return words * kNumberBytes;
        default: return (words + kChunkWords - 1) / kChunkWords * kChunkBytes[int8];
    }
}

int64_t per_token(const Matrix& matrix, const Isa& isa, bool int8) {
    int64_t bytes = 0;
    for (int64_t kind = 0; kind < matrix.kinds(); kind++) bytes += bytes_of(matrix, isa, kind, int8);
    return bytes;
}

// What step 2 has made of the activations of a few tokens.
class Prepared {
   public:
    // Room for so many tokens; what was there is lost.
    void reserve(const Matrix& matrix, const Isa& isa, bool int8, int64_t tokens) {
        Pieces measure;
        lay_out(measure, matrix, isa, int8, tokens);
        Pieces pieces{workspace_.reserve(measure.used)};
        lay_out(pieces, matrix, isa, int8, tokens);
    }
    // Of one token, x [m].
    void make(const Matrix& matrix, const Isa& isa, bool int8, int64_t token, const char* x, Scalar type) {
        float *own = x_ + token * matrix.m, *columns = columns_ + token * most_columns_;
        to_floats(x, type, matrix.m, own);
        for (int64_t kind = 0; kind < matrix.kinds(); kind++) {
            const Activations& of = kinds_[kind];
            const Room& to = rooms_[kind];
            matrix.columns(kind, own, columns);
            isa.prepare[static_cast<int>(matrix.form(kind))](
                columns, of.words, of.run, of.runs, int8, to.tables + token * bytes_of(matrix, isa, kind, int8),
                to.steps + token * of.words, to.sums + token * of.runs);
        }
    }
    const Activations* kinds() const { return kinds_.data(); }

    uint64_t call = 0;  // for which it was made

   private:
    struct Room {
        char* tables;
        float *steps, *sums;
    };

    void lay_out(Pieces& pieces, const Matrix& matrix, const Isa& isa, bool int8, int64_t tokens) {
        kinds_.clear();
        rooms_.clear();
        most_columns_ = 0;
        for (int64_t kind = 0; kind < matrix.kinds(); kind++) {
            const int64_t words = matrix.kind_words(kind);
            const std::vector<Run>& runs = matrix.kind_runs(kind);
            const int64_t count = static_cast<int64_t>(runs.size());
            most_columns_ = std::max(most_columns_, 32 * words);
            const Room room{pieces.take<char>(tokens * bytes_of(matrix, isa, kind, int8)),
                            pieces.take<float>(tokens * words), pieces.take<float>(tokens * count)};
            rooms_.push_back(room);
            kinds_.push_back({tokens, words, count, runs.data(), room.tables, room.steps, room.sums});
        }
        x_ = pieces.take<float>(tokens * matrix.m);
        columns_ = pieces.take<float>(tokens * most_columns_);
    }

    Workspace workspace_;
    std::vector<Activations> kinds_;
    std::vector<Room> rooms_;
    int64_t most_columns_ = 0;
    float *x_ = nullptr, *columns_ = nullptr;
};

std::atomic<uint64_t> calls{0};

// Not within a function: threads that never came by would use them before they are made, and not free them.
thread_local Workspace outputs;
thread_local Prepared prepared;

void multiply_few(const Matrix& matrix, const Isa& isa, const char* x, char* y, Scalar type, int64_t tokens, bool int8,
                  int threads) {
    const int64_t width = static_cast<int64_t>(size_of(type)), x_bytes = matrix.m * width;
    const int64_t stride = (matrix.n + kOutputRows - 1) / kOutputRows * kOutputRows;
    // Sums are outputs, unless these are of another type, or rows behind the last one would be written.
    const bool in_place = type == Scalar::f32 && stride == matrix.n;
    float* sums = reinterpret_cast<float*>(in_place ? y : outputs.reserve(static_cast<size_t>(tokens * stride) * 4));

    // Tables of few tokens each thread makes itself: fresh in another core's cache they take longer to read.
    const bool each = tokens <= kFewTokens && per_token(matrix, isa, int8) > kSharedBytesPerColumn * matrix.m;
    const uint64_t call = calls.fetch_add(1, std::memory_order_relaxed) + 1;
    const Prepared* shared = nullptr;
    if (!each) {
        prepared.reserve(matrix, isa, int8, tokens);
        Prepared& own = prepared;
        parallel_for(tokens, threads, [&](int64_t token) {
            own.make(matrix, isa, int8, token, x + token * x_bytes, type);
        });
        shared = &own;
    }
    const auto prepared_here = [&]() -> const Activations* {
        if (shared) return shared->kinds();
        if (prepared.call != call) {
            prepared.reserve(matrix, isa, int8, tokens);
            for (int64_t token = 0; token < tokens; token++) {
                prepared.make(matrix, isa, int8, token, x + token * x_bytes, type);
            }
            prepared.call = call;
        }
        return prepared.kinds();
    };

    const Rows rows = matrix.rows(isa, int8);
    const int64_t step = rows_of_task(isa, matrix.n, threads), tasks = (matrix.n + step - 1) / step;
    parallel_for(tasks, threads, [&](int64_t task) {
        rows(matrix.self(), prepared_here(), task * step, std::min((task + 1) * step, matrix.n), sums, stride);
    });
    if (in_place) return;
    parallel_for(tokens, threads, [&](int64_t token) {
        from_floats(sums + token * stride, matrix.n, type, y + token * matrix.n * width);
    });
}

// How many tokens are worked on together.
int64_t tokens_together(const Matrix& matrix, const Isa& isa, bool int8) {
    const int64_t bytes = std::max<int64_t>(per_token(matrix, isa, int8), 1);
    // Their rows take turns in panels, whose tables fit the second-level cache; all of them should fit the last.
    const bool halfwords = matrix.kinds() && matrix.form(0) == Form::halfwords;
    if (halfwords) return kHalfwordTokens * bytes <= kHalfwordTableBytes ? kHalfwordTokens : kTokens;
    return std::clamp<int64_t>(kTableBytes / bytes, 1, kTokens);
}

}  // namespace

std::vector<Run> runs_of(int64_t columns, int64_t group_size) {
    std::vector<Run> runs;
    const int64_t size = group_size ? group_size : columns;
    for (int64_t start = 0; start < columns; start += size) {
        const int64_t stop = std::min(start + size, columns);
        const uint32_t from = ~0u << (start % 32), upto = ~0u >> ((32 - stop % 32) % 32);
        const bool one_word = start / 32 == (stop - 1) / 32;
        runs.push_back({start / 32, (stop + 31) / 32, one_word ? from & upto : from, one_word ? from & upto : upto});
    }
    return runs;
}

void Matrix::columns(int64_t, const float* x, float* out) const {
    std::copy(x, x + m, out);
    std::fill(out + m, out + 32 * words, 0.0f);
}

void multiply(const Matrix& matrix, const Isa& isa, const void* x, void* y, Scalar type, int64_t tokens, bool int8,
              int threads) {
    const Matrix* best = &matrix;
    for (const auto& other : matrix.better) {
        if (tokens <= other->most_tokens && other->rows(isa, int8)) best = other.get();
    }
    const Matrix& w = *best;
    const int64_t width = static_cast<int64_t>(size_of(type));
    const int64_t most = tokens_together(w, isa, int8);
    for (int64_t token = 0; token < tokens; token += most) {
        multiply_few(w, isa, static_cast<const char*>(x) + token * w.m * width,
                     static_cast<char*>(y) + token * w.n * width, type, std::min(most, tokens - token), int8, threads);
    }
}

}  // namespace kernels
