// The integer engine of swincompress_pl for C++ programs: loads an artifact, runs it on images. Needs no Python.
//
//     swincompress::Engine engine = swincompress::Engine::load("model.safetensors");
//     std::vector<std::uint8_t> image = ...;  // height x width x channels, channels last, raw pixels 0 to 255
//     std::vector<float> logits = engine.run(image);
//
// Artifacts are written by swincompress_pl.accel.export, without compression. The logits are the same bits on every
// CPU, with every implementation and any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace swincompress {

// Every error of this header; the message names the thing, the value and the remedy. Memory that the system does not
// give is std::bad_alloc. Threads are started by the first run.
class Error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

struct Options {
    // 1 to 256; without a number, as many as there are CPUs that this process may use: its affinity mask and the CPU
    // quotas of its control groups, whole CPUs, decide.
    std::optional<int> threads;
    // A name of implementations(). Empty: the one that the environment variable SWINCOMPRESS_IMPLEMENTATION names, or
    // the best.
    std::string implementation;
    // An artifact that takes more, beside its own bytes and the caller's arrays, is refused.
    std::int64_t memory_bytes_max = std::int64_t{1} << 32;
};

// Names of the kernel implementations that this CPU can run, best first.
std::vector<std::string> implementations();

// A network ready to run. May be moved; calls from several threads take turns; engines are independent of each other.
// A forked child may go on with its copy, whatever the parent's threads were doing.
class Engine {
public:
    // Throws Error for a file that cannot be read, that is no artifact, or that lies about itself: a network that loads
    // computes on any image within the bounds of the norm.
    static Engine load(const std::string& path, const Options& options = {});
    // The same from memory, of which nothing is kept.
    static Engine from_bytes(const void* bytes, std::size_t size, const Options& options = {});

    Engine(Engine&&) noexcept;
    Engine& operator=(Engine&&) noexcept;
    ~Engine();

    // (height, width, channels) of an image, or (time steps, height, width, channels) of counts of events; uint8, the
    // last axis varies fastest.
    const std::vector<std::int64_t>& input_shape() const;
    // The product of input_shape(): bytes of one image.
    std::size_t input_size() const;
    std::size_t class_count() const;
    // Names in the order of the logits; empty where the artifact has none.
    const std::vector<std::string>& classes() const;
    // What one step of an integer logit is worth.
    double logit_scale() const;
    std::string implementation() const;
    int threads() const;

    // images: whole images one after another -> their logits, (images, class_count()). No images give no logits. Throws
    // Error where the size is no multiple of input_size().
    std::vector<float> run(const std::vector<std::uint8_t>& images);
    // images: count * input_size() bytes; logits: room for count * class_count().
    void run(const std::uint8_t* images, std::size_t count, float* logits);
    // The integers behind the logits.
    void run_integer(const std::uint8_t* images, std::size_t count, std::int32_t* logits);

private:
    struct State;
    explicit Engine(std::unique_ptr<State> state);

    std::unique_ptr<State> state_;
};

}  // namespace swincompress
