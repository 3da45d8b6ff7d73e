// Loads mutants of artifacts and runs what loads, to be built with sanitizers:
//     fuzz_artifacts COUNT SEED FIRST artifact...
// Mutant number n of FIRST to FIRST + COUNT - 1 depends on (SEED, n) only, so a failure is run again with COUNT = 1.
// A mutant must be refused with an Error or give the same integers by every implementation; anything else, an end by a
// sanitizer or more than a minute included, is a failure. Prints how often which guard refused.
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>

#include "artifact/sha256.h"
#include "mutate.h"
#include "swincompress/engine.h"

namespace swincompress::fuzz {
namespace {

constexpr unsigned kSecondsMax = 60;
constexpr std::int64_t kMemoryBytesMax = 1 << 25;

volatile unsigned long current = 0;  // the handler of a signal reads it

void tell_hang(int) {
    char text[64];
    const int size = std::snprintf(text, sizeof(text), "mutant %lu: no answer after %u s\n", current, kSecondsMax);
    if (write(2, text, static_cast<std::size_t>(size)) < 0) _exit(4);
    _exit(3);
}

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "mutant %lu: %s\n", static_cast<unsigned long>(current), what.c_str());
    std::exit(1);
}

std::vector<std::byte> read_file(const char* path) {
    std::ifstream file(path, std::ios::binary);
    std::string text{std::istreambuf_iterator<char>(file), {}};
    if (!file) fail(std::string(path) + " cannot be read");
    const auto* bytes = reinterpret_cast<const std::byte*>(text.data());
    return {bytes, bytes + text.size()};
}

// The message without names and numbers: which guard it was.
std::string guard_of(const std::string& message) {
    std::string guard;
    for (std::size_t at = 0; at < message.size() && guard.size() < 100; ++at) {
        const char c = message[at];
        if (c == '"' || c == '\'') {
            const std::size_t end = message.find(c, at + 1);
            if (end == std::string::npos) break;
            at = end;
            guard += "'_'";
        } else if (c >= '0' && c <= '9') {
            if (guard.empty() || guard.back() != '#') guard += '#';
        } else {
            guard += c;
        }
    }
    return guard;
}

std::vector<std::uint8_t> images_of(const Engine& engine, Random& random) {
    std::vector<std::uint8_t> images(engine.input_size() * (1 + random.below(2)));
    const std::size_t style = random.below(4);
    for (std::uint8_t& pixel : images)
        pixel = style == 0 ? 0 : style == 1 ? 255 : static_cast<std::uint8_t>(random.next());
    return images;
}

// The integers of every output, one after another. Each output has memory of its own size: a byte beyond it is seen.
std::vector<std::byte> integers_of(Engine& engine, const std::vector<std::uint8_t>& images) {
    const std::size_t count = images.size() / engine.input_size();
    std::vector<std::vector<std::byte>> room;
    std::vector<void*> places;
    for (const Output& output : engine.outputs()) {
        const std::size_t bytes = output.type == "int8" ? 1 : output.type == "int16" ? 2 : 4;
        places.push_back(room.emplace_back(count * output.size * bytes).data());
    }
    engine.run_outputs_integer(images.data(), count, places);
    std::vector<std::byte> all;
    for (const std::vector<std::byte>& each : room) all.insert(all.end(), each.begin(), each.end());
    return all;
}

// Whether it loaded; its guard is counted where it did not.
bool try_mutant(const std::vector<std::byte>& bytes, Random& random, std::map<std::string, unsigned long>& guards) {
    std::vector<std::byte> expected;
    std::vector<std::uint8_t> images;
    for (const std::string& name : implementations()) {
        Options options{1 + static_cast<int>(random.below(3)), name, kMemoryBytesMax};
        try {
            // a copy of its exact size: a byte read beyond it is seen
            const std::vector<std::byte> exact(bytes);
            Engine engine = Engine::from_bytes(exact.data(), exact.size(), options);
            if (images.empty()) images = images_of(engine, random);
            const std::vector<std::byte> integers = integers_of(engine, images);
            if (!expected.empty() && integers != expected) fail(name + " gives other integers");
            expected = integers;
        } catch (const Error& error) {
            if (!expected.empty()) fail(name + " refuses what another runs: " + error.what());
            ++guards[guard_of(error.what())];
            return false;
        }
    }
    return true;
}

void check_sha256(Random& random) {
    std::vector<unsigned char> data(64 * 9);
    for (unsigned char& byte : data) byte = static_cast<unsigned char>(random.next());
    std::array<std::uint32_t, 8> fast{1, 2, 3, 4, 5, 6, 7, 8}, plain = fast;
    sha256_blocks(fast.data(), data.data(), 9);
    sha256_blocks_plain(plain.data(), data.data(), 9);
    if (fast != plain) fail("SHA-256 by instructions differs from SHA-256 in plain C++");
}

// Each must load before it is changed, take no images, and refuse a part of one.
void check_sound(const Parts& original) {
    const std::vector<std::byte> bytes = put_together(original);
    Engine engine = Engine::from_bytes(bytes.data(), bytes.size());
    for (const auto& [name, values] : engine.run_outputs({}))
        if (!values.empty()) fail(name + " of no images");
    try {
        engine.run_outputs(std::vector<std::uint8_t>(engine.input_size() + 1));
    } catch (const Error&) {
        return;
    }
    fail("a part of an image is taken");
}

int run(unsigned long count, std::uint64_t seed, unsigned long first, const std::vector<Parts>& originals) {
    std::map<std::string, unsigned long> guards;
    unsigned long loaded = 0;
    for (unsigned long number = first; number < first + count; ++number) {
        current = number;
        Random random(seed * 0x100000001b3 + number);
        const Parts& original = random.among(originals);
        alarm(kSecondsMax);
        try {
            loaded += try_mutant(mutant(original, random.next()), random, guards) ? 1 : 0;
        } catch (const std::exception& error) {
            fail(std::string("not an Error but ") + error.what());
        }
        alarm(0);
    }
    std::printf("%lu mutants: %lu loaded and ran, %lu were refused by %zu guards\n", count, loaded, count - loaded,
                guards.size());
    for (const auto& [guard, times] : guards) std::printf("%8lu  %s\n", times, guard.c_str());
    return 0;
}

}  // namespace
}  // namespace swincompress::fuzz

int main(int count, char** arguments) {
    using namespace swincompress::fuzz;
    if (count < 5) {
        std::fprintf(stderr, "usage: fuzz_artifacts COUNT SEED FIRST artifact...\n");
        return 2;
    }
    std::signal(SIGALRM, tell_hang);
    std::vector<Parts> originals;
    for (int i = 4; i < count; ++i) originals.push_back(take_apart(read_file(arguments[i])));
    for (const Parts& original : originals) check_sound(original);
    Random random(1);
    check_sha256(random);
    const auto number = [&](int at) { return std::strtoul(arguments[at], nullptr, 10); };
    return run(number(1), number(2), number(3), originals);
}
