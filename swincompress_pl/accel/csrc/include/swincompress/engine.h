// The integer engine of swincompress_pl for C++ programs: it loads an artifact and runs it on images, without Python.
//
//     swincompress::Engine engine = swincompress::Engine::load("model.safetensors");
//     std::vector<std::uint8_t> image = ...;  // height x width x channels, channels last, raw pixels 0 to 255
//     std::vector<float> logits = engine.run(image);
//
// An artifact with named outputs, such as the feature maps of a backbone, gives no logits; run_outputs gives its
// results.
//
// swincompress_pl.accel.export writes artifacts. Those of compression="lzma" need a library that was built where
// liblzma and zlib were found. The results are the same bits on every CPU, with every implementation and any number of
// threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace swincompress {

// The error of every function here. The message names the thing, the value and the remedy. If the system does not give
// memory, std::bad_alloc is thrown instead. The first run starts the threads, which all engines of a process share.
class Error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

struct Options {
    // 1 to 256. Without a number, as many as this process may use whole CPUs, by its affinity mask and the CPU quotas
    // of its control groups.
    std::optional<int> threads;
    // One of implementations(). If empty, the environment variable SWINCOMPRESS_IMPLEMENTATION decides; without it, the
    // best one runs.
    std::string implementation;
    // An artifact that needs more bytes than this, besides its own and those of the caller's arrays, is refused.
    std::int64_t memory_bytes_max = std::int64_t{1} << 32;
};

// One step of an engine, for a whole batch. A step may cover several operations that run as one; then "+" joins their
// names and kinds.
struct ProfileRow {
    std::string operation;
    std::string kind;      // such as "linear"
    std::int64_t time_ns;  // the median over the repeats
    std::int64_t macs;     // multiply-accumulates
    std::int64_t bytes;    // read and written, values and tensors, each counted once
};

// Names of the kernel implementations that this CPU can run, the best first.
std::vector<std::string> implementations();

// One result of an engine.
struct Output {
    std::string name;                 // "logits" where the artifact names none
    std::vector<std::int64_t> shape;  // of one image, channels last, such as (height, width, channels)
    std::string type;                 // of its integers: "int8", "int16" or "int32"
    double scale;                     // the real value of one step
    std::size_t size;                 // elements of one image: the product of the shape
};

// A network that is ready to run. It may be moved. Calls from several threads take turns. Engines are independent of
// each other. A forked child may use its copy, whatever the parent's threads were doing.
class Engine {
public:
    // Throws Error for a file that cannot be read, is not an artifact, or contradicts itself. A network that loads
    // stays within the bounds of the specification on any image.
    static Engine load(const std::string& path, const Options& options = {});
    // Loads an artifact from memory, which may be freed afterwards.
    static Engine from_bytes(const void* bytes, std::size_t size, const Options& options = {});

    Engine(Engine&&) noexcept;
    Engine& operator=(Engine&&) noexcept;
    ~Engine();

    // (height, width, channels) of an image, or (time steps, height, width, channels) of counts of events. The type is
    // uint8, and the last axis varies fastest.
    const std::vector<std::int64_t>& input_shape() const;
    // The bytes of one image: the product of input_shape().
    std::size_t input_size() const;
    // What it gives, in the order of the artifact: the logits alone, or the named outputs.
    const std::vector<Output>& outputs() const;
    // The number of logits; 0 with named outputs.
    std::size_t class_count() const;
    // The class names in the order of the logits; empty if the artifact has none.
    const std::vector<std::string>& classes() const;
    // The real value of one step of an integer logit.
    double logit_scale() const;
    std::string implementation() const;
    int threads() const;

    // Maps images, one after another, to their logits (images, class_count()). No images give no logits. Throws Error
    // if the size is not a multiple of input_size(), or the artifact has named outputs.
    std::vector<float> run(const std::vector<std::uint8_t>& images);
    // `images` has count * input_size() bytes; `logits` has room for count * class_count().
    void run(const std::uint8_t* images, std::size_t count, float* logits);
    // The integers behind the logits.
    void run_integer(const std::uint8_t* images, std::size_t count, std::int32_t* logits);

    // The same for every output, by its name: (images, *shape). Throws Error if the size is not a multiple of
    // input_size().
    std::map<std::string, std::vector<float>> run_outputs(const std::vector<std::uint8_t>& images);
    // `results` has one array per output, in the order of outputs(), with room for count * size integers of its type.
    void run_outputs_integer(const std::uint8_t* images, std::size_t count, const std::vector<void*>& results);

    // Times every step, in order of execution. Names are as the artifact has them: escape what you print of a file that
    // is not yours. Throws Error if `count` or `repeats` is below 1.
    std::vector<ProfileRow> profile(const std::uint8_t* images, std::size_t count, int repeats = 10);

private:
    struct State;
    explicit Engine(std::unique_ptr<State> state);
    static std::unique_ptr<State> state_of(const void* bytes, std::size_t size, const Options& options, bool spend);

    std::unique_ptr<State> state_;
};

}  // namespace swincompress
