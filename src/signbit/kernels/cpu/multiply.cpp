// The three steps of a product, for all layouts and instruction sets.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "floats.h"
#include "kernels.h"
#include "threads.h"

namespace kernels {
namespace {

// Bytes of tables that are in use at a time: they are read again for every tile, and belong in the second-level cache.
constexpr int64_t kTableBytes = 1 << 20;

// Tiles of a task: so many that a task is worth its start, so few that threads end together; layouts with strips of
// rows want a multiple of four.
constexpr int64_t kLeastTiles = 4, kMostTiles = 16, kTasksPerThread = 3;

int64_t rows_of_task(const Isa& isa, int64_t n, int threads) {
    const int64_t tiles = n / (isa.tile * kTasksPerThread * std::max(threads, 1));
    return isa.tile * std::clamp(tiles / kLeastTiles * kLeastTiles, kLeastTiles, kMostTiles);
}

// Memory of the calling thread that stays from one call to the next.
class Workspace {
   public:
    // Room for so many bytes, aligned to cache lines; what was there is lost.
    char* reserve(size_t bytes) {
        if (bytes > size_) {
            memory_.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
            size_ = memory_ ? bytes : 0;
            if (!memory_) throw std::bad_alloc();
        }
        return memory_.get();
    }

   private:
    struct Free {
        void operator()(char* memory) const { std::free(memory); }
    };
    std::unique_ptr<char, Free> memory_;
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

size_t bytes_of_word(const Isa& isa, Form form, bool int8) {
    return form == Form::tables ? isa.table_bytes[int8] : static_cast<size_t>(kNumberBytes);
}

// The most of all kinds.
size_t bytes_of_word(const Matrix& matrix, const Isa& isa, bool int8) {
    size_t bytes = 0;
    for (int64_t kind = 0; kind < matrix.kinds(); kind++) {
        bytes = std::max(bytes, bytes_of_word(isa, matrix.form(kind), int8));
    }
    return bytes;
}

// Everything a few tokens need besides the matrix.
struct Work {
    float* x;         // [m], one token's activations
    float* columns;   // [32 * words]
    float* y;         // [tokens, n]
    char* tables;     // [kinds][tokens][words][bytes of a word]
    float* steps;     // [kinds][tokens][words]
    float* sums;      // [kinds][tokens][runs]
    int64_t most_runs = 0;

    Work(Pieces& pieces, const Matrix& matrix, size_t table_bytes, int64_t tokens) {
        const int64_t sets = matrix.kinds() * tokens;
        for (int64_t kind = 0; kind < matrix.kinds(); kind++) {
            most_runs = std::max(most_runs, static_cast<int64_t>(matrix.kind_runs(kind).size()));
        }
        x = pieces.take<float>(matrix.m);
        columns = pieces.take<float>(32 * matrix.words);
        y = pieces.take<float>(tokens * matrix.n);
        tables = pieces.take<char>(sets * matrix.words * static_cast<int64_t>(table_bytes));
        steps = pieces.take<float>(sets * matrix.words);
        sums = pieces.take<float>(sets * most_runs);
    }
};

void multiply_few(const Matrix& matrix, const Isa& isa, const char* x, char* y, Scalar type, int64_t tokens, bool int8,
                  int threads) {
    static thread_local Workspace workspace;
    const size_t table_bytes = bytes_of_word(matrix, isa, int8), width = size_of(type);
    Pieces measure;
    Work(measure, matrix, table_bytes, tokens);
    Pieces pieces{workspace.reserve(measure.used)};
    Work work(pieces, matrix, table_bytes, tokens);
    const Rows few = tokens <= kFewTokens ? matrix.few(isa, int8) : nullptr;
    const int64_t kinds = few ? 1 : matrix.kinds();

    std::vector<Activations> activations;
    for (int64_t kind = 0; kind < kinds; kind++) {
        const int64_t set = kind * tokens;
        const std::vector<Run>& runs = matrix.kind_runs(kind);
        activations.push_back({tokens, matrix.kind_words(kind), static_cast<int64_t>(runs.size()), runs.data(),
                               work.tables + set * matrix.words * table_bytes, work.steps + set * matrix.words,
                               work.sums + set * work.most_runs});
    }
    for (int64_t token = 0; token < tokens; token++) {
        to_floats(x + token * matrix.m * width, type, matrix.m, work.x);
        for (int64_t kind = 0; kind < kinds; kind++) {
            const Activations& of = activations[kind];
            matrix.columns(kind, work.x, work.columns);
            const Form form = few ? Form::numbers : matrix.form(kind);
            const auto prepare = form == Form::tables ? isa.prepare : isa.prepare_numbers;
            prepare(work.columns, of.words, of.run, of.runs, int8,
                    const_cast<char*>(of.tables) + token * of.words * bytes_of_word(isa, form, int8),
                    const_cast<float*>(of.steps) + token * of.words, const_cast<float*>(of.sums) + token * of.runs);
        }
    }

    const Rows rows = few ? few : matrix.rows(isa, int8);
    const int64_t step = rows_of_task(isa, matrix.n, threads), tasks = (matrix.n + step - 1) / step;
    parallel_for(tasks, threads, [&](int64_t task) {
        rows(matrix.self(), activations.data(), task * step, std::min((task + 1) * step, matrix.n), work.y, matrix.n);
    });
    for (int64_t token = 0; token < tokens; token++) {
        from_floats(work.y + token * matrix.n, matrix.n, type, y + token * matrix.n * width);
    }
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
    const size_t width = size_of(type);
    const int64_t per_token = matrix.kinds() * matrix.words * static_cast<int64_t>(bytes_of_word(matrix, isa, int8));
    const int64_t most = std::clamp<int64_t>(kTableBytes / per_token, 1, kTokens);
    for (int64_t token = 0; token < tokens; token += most) {
        multiply_few(matrix, isa, static_cast<const char*>(x) + token * matrix.m * width,
                     static_cast<char*>(y) + token * matrix.n * width, type, std::min(most, tokens - token), int8,
                     threads);
    }
}

}  // namespace kernels
