// What the public header says about artifacts, a line each, for comparison with Python:
//     read_artifacts logits FILE...       the integer logits of two images, or "refused: " and the message
//     read_artifacts outputs FILE...      name, type, shape, scale and the integers of every output for two images
//     read_artifacts profile FILE COUNT   of so many images: operation, kind, ns, MACs and bytes of each step
//     read_artifacts load FILE...         the median time of a load in ns; the files take turns
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "swincompress/engine.h"

namespace {

std::vector<std::uint8_t> images_of(const swincompress::Engine& engine, std::size_t count) {
    std::vector<std::uint8_t> images(count * engine.input_size());
    for (std::size_t i = 0; i < images.size(); ++i) images[i] = static_cast<std::uint8_t>(37 * i + 11);
    return images;
}

void print_logits(const char* path) {
    try {
        swincompress::Options options;
        options.threads = 1;
        swincompress::Engine engine = swincompress::Engine::load(path, options);
        std::vector<std::int32_t> logits(2 * engine.class_count());
        engine.run_integer(images_of(engine, 2).data(), 2, logits.data());
        for (const std::int32_t logit : logits) std::printf("%d ", logit);
        std::printf("\n");
    } catch (const swincompress::Error& error) {
        std::printf("refused: %.200s\n", error.what());
    }
}

template <typename Integer>
void print_integers(const std::vector<std::int32_t>& room, std::size_t count) {
    const auto* integers = reinterpret_cast<const Integer*>(room.data());
    for (std::size_t i = 0; i < count; ++i) std::printf(" %d", static_cast<int>(integers[i]));
    std::printf("\n");
}

void print_outputs(const char* path) {
    swincompress::Options options;
    options.threads = 2;
    swincompress::Engine engine = swincompress::Engine::load(path, options);
    const std::vector<std::uint8_t> images = images_of(engine, 2);
    std::vector<std::vector<std::int32_t>> room;  // wide enough for any type
    std::vector<void*> places;
    for (const swincompress::Output& output : engine.outputs())
        places.push_back(room.emplace_back(2 * output.size).data());
    engine.run_outputs_integer(images.data(), 2, places);
    const auto floats = engine.run_outputs(images);
    for (std::size_t i = 0; i < room.size(); ++i) {
        const swincompress::Output& output = engine.outputs()[i];
        std::printf("%s %s (", output.name.c_str(), output.type.c_str());
        for (const std::int64_t size : output.shape) std::printf("%lld,", static_cast<long long>(size));
        std::printf(") %.17g %.9g", output.scale, static_cast<double>(floats.at(output.name).back()));
        if (output.type == "int8") print_integers<std::int8_t>(room[i], 2 * output.size);
        if (output.type == "int16") print_integers<std::int16_t>(room[i], 2 * output.size);
        if (output.type == "int32") print_integers<std::int32_t>(room[i], 2 * output.size);
    }
    try {
        engine.run(images);
    } catch (const swincompress::Error& error) {
        std::printf("refused: %s\n", error.what());
    }
    try {
        engine.run_outputs_integer(images.data(), 2, {});
    } catch (const swincompress::Error& error) {
        std::printf("refused: %s\n", error.what());
    }
}

void print_profile(const char* path, std::size_t count) {
    swincompress::Options options;
    options.threads = 1;
    swincompress::Engine engine = swincompress::Engine::load(path, options);
    const std::vector<std::uint8_t> images = images_of(engine, count);
    for (const swincompress::ProfileRow& row : engine.profile(images.data(), count, 4))
        std::printf("%s\t%s\t%lld\t%lld\t%lld\n", row.operation.c_str(), row.kind.c_str(),
                    static_cast<long long>(row.time_ns), static_cast<long long>(row.macs),
                    static_cast<long long>(row.bytes));
    for (const int wrong : {0, -3}) try {
            engine.profile(images.data(), 1, wrong);
        } catch (const swincompress::Error& error) {
            std::printf("refused: %s\n", error.what());
        }
    try {
        engine.profile(images.data(), 0);
    } catch (const swincompress::Error& error) {
        std::printf("refused: %s\n", error.what());
    }
}

void print_load_times(int count, char** paths) {
    constexpr std::size_t kRounds = 31;
    using Clock = std::chrono::steady_clock;
    swincompress::Options options;
    options.threads = 1;
    std::vector<std::vector<long long>> times(static_cast<std::size_t>(count));
    for (std::size_t round = 0; round <= kRounds; ++round)  // the first is not counted
        for (std::size_t i = 0; i < times.size(); ++i) {
            const auto start = Clock::now();
            const swincompress::Engine engine = swincompress::Engine::load(paths[i], options);
            const auto taken = Clock::now() - start;
            if (round > 0) times[i].push_back(std::chrono::duration_cast<std::chrono::nanoseconds>(taken).count());
        }
    for (std::vector<long long>& each : times) {
        std::sort(each.begin(), each.end());
        std::printf("%lld\n", each[kRounds / 2]);
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count == 4 && arguments[1] == std::string("profile")) {
        print_profile(arguments[2], std::strtoul(arguments[3], nullptr, 10));
        return 0;
    }
    if (count > 2 && arguments[1] == std::string("outputs")) {
        for (int i = 2; i < count; ++i) print_outputs(arguments[i]);
        return 0;
    }
    if (count > 2 && arguments[1] == std::string("load")) {
        print_load_times(count - 2, arguments + 2);
        return 0;
    }
    for (int i = 2; i < count; ++i) print_logits(arguments[i]);
    return 0;
}
