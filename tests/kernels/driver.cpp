// The kernels against plain sums in double, without Python: `make driver`, and for ARM under an emulator `make neon`.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "decoder.h"
#include "dispatch.h"
#include "matrices.h"
#include "rounding.h"

using namespace kernels;

namespace {

int passed = 0, failed = 0;

struct Case {
    int64_t n, m, group_size, planes, tokens;
    bool mean, int8;
};

// Sign planes with coefficients in float32, and the products they should give.
void run(const Isa& isa, const Case& c) {
    std::mt19937 random(static_cast<unsigned>(c.n + c.m + c.group_size));
    std::normal_distribution<float> normal;
    const int64_t groups = c.group_size ? (c.m + c.group_size - 1) / c.group_size : 1, row_bytes = (c.m + 31) / 32 * 4;
    std::vector<uint8_t> bits(static_cast<size_t>(c.planes * c.n * row_bytes));
    std::vector<float> scales(static_cast<size_t>(c.planes * c.n * groups)), means(static_cast<size_t>(c.n * groups));
    std::vector<float> x(static_cast<size_t>(c.tokens * c.m)), y(static_cast<size_t>(c.tokens * c.n));
    for (uint8_t& byte : bits) byte = static_cast<uint8_t>(random());
    for (float& value : scales) value = 1.0f + std::abs(normal(random));
    for (float& value : means) value = normal(random);
    for (float& value : x) value = normal(random);

    std::vector<Plane> planes;
    std::vector<Coefficients> coefficients;
    for (int64_t p = 0; p < c.planes; p++) {
        planes.push_back({bits.data() + p * c.n * row_bytes, row_bytes});
        coefficients.push_back({scales.data() + p * c.n * groups, groups, Scalar::f32});
    }
    const Coefficients mean = {c.mean ? means.data() : nullptr, groups, Scalar::f32};
    const auto matrix = sign_planes(c.n, c.m, c.group_size, planes, coefficients, mean, {});
    multiply(*matrix, isa, x.data(), y.data(), Scalar::f32, c.tokens, c.int8, 2);

    double worst = 0;
    for (int64_t t = 0; t < c.tokens; t++) {
        for (int64_t r = 0; r < c.n; r++) {
            double sum = 0, size = 1e-30;
            for (int64_t column = 0; column < c.m; column++) {
                const int64_t g = c.group_size ? column / c.group_size : 0;
                double weight = c.mean ? means[r * groups + g] : 0.0, largest = std::abs(weight);
                for (int64_t p = 0; p < c.planes; p++) {
                    const bool negative = bits[(p * c.n + r) * row_bytes + column / 8] >> column % 8 & 1;
                    const double scale = scales[(p * c.n + r) * groups + g];
                    weight += negative ? -scale : scale;
                    largest += scale;
                }
                sum += weight * x[t * c.m + column];
                size += largest * std::abs(x[t * c.m + column]);
            }
            worst = std::max(worst, std::abs(y[t * c.n + r] - sum) / size);
        }
    }
    const bool good = worst < (c.int8 ? 2e-2 : 1e-5);
    ++(good ? passed : failed);
    if (!good) {
        std::printf("%s: %lld x %lld, groups of %lld, %lld planes, %lld tokens, int8 %d: off by %g\n", isa.name,
                    static_cast<long long>(c.n), static_cast<long long>(c.m), static_cast<long long>(c.group_size),
                    static_cast<long long>(c.planes), static_cast<long long>(c.tokens), c.int8, worst);
    }
}

// What lies between the products of a decoder layer, and rows of floats.
void run_steps(const Isa& isa, int64_t features, int64_t tokens) {
    std::mt19937 random(static_cast<unsigned>(features + tokens));
    std::normal_distribution<float> normal;
    const auto some = [&](int64_t count) {
        std::vector<float> values(static_cast<size_t>(count));
        for (float& value : values) value = 2 * normal(random);
        return values;
    };
    const auto compare = [&](const char* what, const std::vector<float>& found, const std::vector<double>& wanted) {
        double worst = 0, size = 1e-30;
        for (size_t i = 0; i < wanted.size(); i++) {
            worst = std::max(worst, std::abs(found[i] - wanted[i]));
            size = std::max(size, std::abs(wanted[i]));
        }
        const bool good = worst <= 1e-5 * size;
        ++(good ? passed : failed);
        if (!good) {
            std::printf("%s: %s of %lld features, %lld tokens: off by %g\n", isa.name, what,
                        static_cast<long long>(features), static_cast<long long>(tokens), worst / size);
        }
    };
    const std::vector<float> q = some(features), weight = some(features);
    std::vector<float> y(q.size());
    std::vector<double> wanted(q.size());

    double squares = 0;
    for (const float value : q) squares += static_cast<double>(value) * value;
    isa.decoder.rms_norm(q.data(), {weight.data(), 0.01f}, features, y.data());
    for (size_t i = 0; i < q.size(); i++) {
        wanted[i] = q[i] / std::sqrt(squares / static_cast<double>(features) + 0.01f) * weight[i];
    }
    compare("rms_norm", y, wanted);

    std::vector<float> gate = q;
    gate[0] = -200.0f;
    for (size_t i = 0; i < q.size(); i++) {
        wanted[i] = gate[i] / (1 + std::exp(-static_cast<double>(gate[i]))) * weight[i];
    }
    isa.decoder.silu_times(gate.data(), weight.data(), features);
    compare("silu_times", gate, wanted);

    const std::vector<float> keys = some(tokens * features), values = some(tokens * features);
    std::vector<float> room(static_cast<size_t>(tokens));
    std::vector<double> scores(room.size());
    isa.decoder.attend(q.data(), keys.data(), values.data(), tokens, features, 0.3f, room.data(), y.data());
    double total = 0, largest = -1e30;
    for (size_t t = 0; t < scores.size(); t++) {
        for (size_t i = 0; i < q.size(); i++) scores[t] += 0.3f * static_cast<double>(q[i]) * keys[t * q.size() + i];
        largest = std::max(largest, scores[t]);
    }
    for (double& score : scores) total += score = std::exp(score - largest);
    std::fill(wanted.begin(), wanted.end(), 0.0);
    for (size_t t = 0; t < scores.size(); t++) {
        for (size_t i = 0; i < q.size(); i++) wanted[i] += scores[t] / total * values[t * q.size() + i];
    }
    compare("attend", y, wanted);

    std::vector<float> products(room.size());
    const auto matrix = dense(tokens, features, keys.data());
    multiply(*matrix, isa, q.data(), products.data(), Scalar::f32, 1, false, 2);
    for (size_t t = 0; t < scores.size(); t++) {
        scores[t] = 0;
        for (size_t i = 0; i < q.size(); i++) scores[t] += static_cast<double>(q[i]) * keys[t * q.size() + i];
    }
    compare("dense", products, scores);
}

// Columns in turn: that each value is the nearest to what the changes before it make of the target.
void run_rounding(const Isa& isa, int64_t n, int64_t k, bool even) {
    std::mt19937 random(static_cast<unsigned>(n + k));
    std::normal_distribution<float> normal;
    const std::vector<int32_t> counts = {2, 7};
    const int64_t levels = even ? 2 : 7;
    const auto some = [&](int64_t count) {
        std::vector<float> values(static_cast<size_t>(count));
        for (float& value : values) value = normal(random);
        return values;
    };
    const std::vector<float> targets = some(k * n), shares = some(k * k);
    std::vector<float> tables = some(2 * levels * n), before = some(k * n), changes(targets.size());
    for (float& value : tables) value = even ? std::abs(value) : value;
    std::vector<int32_t> which(targets.size());
    for (int32_t& one : which) one = static_cast<int32_t>(random() % 2);
    std::vector<uint8_t> places(targets.size());
    round_in_turn({n, k, targets.data(), shares.data(), before.data(), tables.data(), counts.data(), levels, even,
                   which.data(), n, 1, places.data(), changes.data()},
                  isa, 2);
    bool good = true;
    for (int64_t j = 0; j < k; j++) {
        for (int64_t i = 0; i < n; i++) {
            const int64_t at = j * n + i, z = which[at];
            double target = targets[at];
            for (int64_t l = 0; l < j; l++) target += static_cast<double>(shares[j * k + l]) * changes[l * n + i];
            const auto value = [&](int64_t place) -> double {
                const float* table = tables.data() + z * levels * n + i;
                return even ? table[0] + static_cast<double>(place) * table[n] : table[place * n];
            };
            double nearest = 1e30;
            for (int64_t place = 0; place < counts[z]; place++) {
                nearest = std::min(nearest, std::abs(value(place) - target));
            }
            const double found = value(places[at]), allowed = 1e-5 * (1 + std::abs(target) + k);
            good = good && places[at] < counts[z] && std::abs(found - target) <= nearest + allowed &&
                   std::abs(found - before[at] - changes[at]) <= allowed;
        }
    }
    if (!good) std::printf("%s: rounding, n %d k %d\n", isa.name, static_cast<int>(n), static_cast<int>(k));
    (good ? passed : failed)++;
}

}  // namespace

int main() {
    for (const Isa* isa : instruction_sets()) {
        for (const int64_t n : {1, 32, 77}) {
            for (const int64_t k : {1, 5, 128}) {
                for (const bool even : {false, true}) run_rounding(*isa, n, k, even);
            }
        }
        for (const int64_t features : {1, 12, 64, 100, 128, 577}) {
            for (const int64_t tokens : {1, 7, 300}) run_steps(*isa, features, tokens);
        }
        for (const int64_t n : {1, 5, 33, 64, 200}) {
            for (const int64_t m : {1, 100, 576, 4097}) {
                for (const int64_t group_size : {0, 7, 32, 100, 128}) {
                    for (const bool int8 : {false, true}) {
                        run(*isa, {n, m, group_size, 1, 1, false, int8});
                        run(*isa, {n, m, group_size, 2, 3, true, int8});
                    }
                }
            }
        }
        run(*isa, {33, 576, 64, 3, 17, true, false});
        // Several tiles, and more columns than one panel of tables has.
        for (const bool int8 : {false, true}) run(*isa, {300, 1100, 96, 2, 17, true, int8});
        std::printf("%s done\n", isa->name);
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
