// The public header, implemented by the engine's parts.
#include <algorithm>
#include <fstream>

#include "dispatch.h"
#include "model.h"
#include "process.h"
#include "swincompress/engine.h"

namespace swincompress {
namespace {

std::vector<char> read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    const std::streamoff size = file ? static_cast<std::streamoff>(file.tellg()) : -1;
    // A folder can be opened and reports any size.
    if (size < 0 || size > (std::streamoff{1} << 40)) throw Error(path + ": no such file, or not readable");
    std::vector<char> bytes(static_cast<std::size_t>(size));
    file.seekg(0);
    if (!file.read(bytes.data(), size)) throw Error(path + ": cannot be read to its end");
    return bytes;
}

// Of one or more times; of an even number, the middle between the two in the middle. They are sorted by it.
std::int64_t median(std::vector<Size>& times) {
    std::sort(times.begin(), times.end());
    const std::size_t upper = times.size() / 2, lower = (times.size() - 1) / 2;
    return times[lower] + (times[upper] - times[lower]) / 2;
}

}  // namespace

struct Engine::State {
    Model model;
    std::vector<std::string> classes;
};

Engine::Engine(std::unique_ptr<State> state) : state_(std::move(state)) {}
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;
Engine::~Engine() = default;

Engine Engine::from_bytes(const void* bytes, std::size_t size, const Options& options) {
    try {
        const Resources resources{options.threads.value_or(std::min(usable_cpus(), kThreadsMax)),
                                  options.memory_bytes_max};
        Model model =
            load_model(static_cast<const std::byte*>(bytes), size, select_kernels(options.implementation), resources);
        auto classes = model.classes.value_or(std::vector<std::string>{});
        return Engine(std::make_unique<State>(State{std::move(model), std::move(classes)}));
    } catch (const std::invalid_argument& error) {
        throw Error(error.what());
    }
}

Engine Engine::load(const std::string& path, const Options& options) {
    const std::vector<char> bytes = read_file(path);
    try {
        return from_bytes(bytes.data(), bytes.size(), options);
    } catch (const Error& error) {
        throw Error(path + ": " + error.what());
    }
}

const std::vector<std::int64_t>& Engine::input_shape() const { return state_->model.input.shape; }

std::size_t Engine::input_size() const { return static_cast<std::size_t>(state_->model.input.elements()); }

std::size_t Engine::class_count() const { return static_cast<std::size_t>(state_->model.class_count()); }

const std::vector<std::string>& Engine::classes() const { return state_->classes; }

double Engine::logit_scale() const { return state_->model.logit_scale; }

std::string Engine::implementation() const { return state_->model.executor->implementation(); }

int Engine::threads() const { return state_->model.executor->threads(); }

std::vector<float> Engine::run(const std::vector<std::uint8_t>& images) {
    if (images.size() % input_size() != 0)
        throw Error("images of " + std::to_string(images.size()) + " bytes; give whole images of " +
                    shape_text(input_shape()) + ", " + std::to_string(input_size()) + " bytes each");
    const std::size_t count = images.size() / input_size();
    std::vector<float> logits(count * class_count());
    run(images.data(), count, logits.data());
    return logits;
}

void Engine::run(const std::uint8_t* images, std::size_t count, float* logits) {
    std::vector<std::int32_t> integers(count * class_count());
    run_integer(images, count, integers.data());
    for (std::size_t i = 0; i < integers.size(); ++i) logits[i] = static_cast<float>(integers[i] * logit_scale());
}

void Engine::run_integer(const std::uint8_t* images, std::size_t count, std::int32_t* logits) {
    try {
        state_->model.executor->run({reinterpret_cast<const std::byte*>(images)}, reinterpret_cast<std::byte*>(logits),
                                    static_cast<Size>(count));
    } catch (const std::runtime_error& error) {  // the threads could not be started
        throw Error(error.what());
    }
}

std::vector<ProfileRow> Engine::profile(const std::uint8_t* images, std::size_t count, int repeats) {
    if (count < 1) throw Error("profile needs at least one image, got none");
    if (repeats < 1) throw Error("repeats is " + std::to_string(repeats) + "; it must be at least 1");
    Executor& executor = *state_->model.executor;
    const std::vector<StepCost>& costs = state_->model.costs;
    std::vector<std::vector<Size>> times(costs.size());
    std::vector<std::int32_t> logits(count * class_count());
    for (int repeat = 0; repeat < repeats; ++repeat) {
        std::vector<Size> ns(costs.size(), 0);
        try {
            executor.run({reinterpret_cast<const std::byte*>(images)}, reinterpret_cast<std::byte*>(logits.data()),
                         static_cast<Size>(count), {&ns, nullptr, nullptr});
        } catch (const std::runtime_error& error) {  // the threads could not be started
            throw Error(error.what());
        }
        for (std::size_t step = 0; step < ns.size(); ++step) times[step].push_back(ns[step]);
    }
    std::vector<ProfileRow> rows;
    const auto batch = static_cast<std::int64_t>(count);
    for (std::size_t step = 0; step < costs.size(); ++step) {
        const StepCost& cost = costs[step];
        rows.push_back({cost.operation, cost.kind, median(times[step]), batch * cost.macs,
                        batch * cost.image_bytes + cost.tensor_bytes});
    }
    return rows;
}

}  // namespace swincompress
