// The public header, implemented by the engine's parts.
#include <algorithm>
#include <cstring>
#include <fstream>

#include "engine/model.h"
#include "engine/process.h"
#include "kernels/dispatch.h"
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

std::vector<Output> outputs_of(const Model& model) {
    const auto size = [](const std::vector<Size>& shape) { return static_cast<std::size_t>(element_count(shape)); };
    if (model.outputs.empty()) {
        const std::vector<Size>& shape = model.result(0).shape;
        return {{"logits", {shape.back()}, "int32", model.logit_scale, size(shape)}};
    }
    std::vector<Output> outputs;
    for (std::size_t i = 0; i < model.outputs.size(); ++i) {
        const NamedOutput& output = model.outputs[i];
        outputs.push_back(
            {output.name, output.shape, type_name(model.result(i).type()), output.scale, size(output.shape)});
    }
    return outputs;
}

template <typename Integer>
std::vector<float> scaled(const std::vector<std::byte>& bytes, std::size_t elements, double scale) {
    std::vector<float> values(elements);
    for (std::size_t i = 0; i < elements; ++i) {
        Integer integer;
        std::memcpy(&integer, bytes.data() + i * sizeof(Integer), sizeof(Integer));
        values[i] = static_cast<float>(integer * scale);
    }
    return values;
}

}  // namespace

struct Engine::State {
    Model model;
    std::vector<std::string> classes;
    std::vector<Output> outputs;

    // Images of so many bytes, which must be whole ones.
    std::size_t count_images(std::size_t bytes) const {
        const auto each = static_cast<std::size_t>(model.input.elements());
        if (bytes % each != 0)
            throw Error("images of " + std::to_string(bytes) + " bytes; give whole images of " +
                        shape_text(model.input.shape) + ", " + std::to_string(each) + " bytes each");
        return bytes / each;
    }

    void require_logits() const {
        if (!model.outputs.empty())
            throw Error("the artifact has " + std::to_string(outputs.size()) +
                        " named outputs and no logits; use run_outputs");
    }

    void run(const std::uint8_t* images, std::size_t count, const std::vector<std::byte*>& results,
             const Executor::Watch& watch = {}) {
        try {
            model.executor->run({reinterpret_cast<const std::byte*>(images)}, results, static_cast<Size>(count), watch);
        } catch (const std::runtime_error& error) {  // the threads could not be started
            throw Error(error.what());
        }
    }

    // Room for the integers of every output, aligned for its type.
    std::vector<std::vector<std::byte>> room_for(std::size_t count) const {
        std::vector<std::vector<std::byte>> room;
        for (std::size_t i = 0; i < outputs.size(); ++i)
            room.emplace_back(count * static_cast<std::size_t>(model.result(i).bytes()));
        return room;
    }
};

namespace {

std::vector<std::byte*> places_in(std::vector<std::vector<std::byte>>& room) {
    std::vector<std::byte*> places;
    for (std::vector<std::byte>& each : room) places.push_back(each.data());
    return places;
}

}  // namespace

Engine::Engine(std::unique_ptr<State> state) : state_(std::move(state)) {}
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;
Engine::~Engine() = default;

std::unique_ptr<Engine::State> Engine::state_of(const void* bytes, std::size_t size, const Options& options,
                                                bool spend) {
    try {
        const Resources resources{options.threads.value_or(std::min(usable_cpus(), kThreadsMax)),
                                  options.memory_bytes_max, spend};
        Model model =
            load_model(static_cast<const std::byte*>(bytes), size, select_kernels(options.implementation), resources);
        auto classes = model.classes.value_or(std::vector<std::string>{});
        auto outputs = outputs_of(model);
        return std::make_unique<State>(State{std::move(model), std::move(classes), std::move(outputs)});
    } catch (const std::invalid_argument& error) {
        throw Error(error.what());
    }
}

Engine Engine::from_bytes(const void* bytes, std::size_t size, const Options& options) {
    return Engine(state_of(bytes, size, options, false));
}

Engine Engine::load(const std::string& path, const Options& options) {
    const std::vector<char> bytes = read_file(path);
    try {
        return Engine(state_of(bytes.data(), bytes.size(), options, true));
    } catch (const Error& error) {
        throw Error(path + ": " + error.what());
    }
}

const std::vector<std::int64_t>& Engine::input_shape() const { return state_->model.input.shape; }

std::size_t Engine::input_size() const { return static_cast<std::size_t>(state_->model.input.elements()); }

const std::vector<Output>& Engine::outputs() const { return state_->outputs; }

std::size_t Engine::class_count() const { return static_cast<std::size_t>(state_->model.class_count()); }

const std::vector<std::string>& Engine::classes() const { return state_->classes; }

double Engine::logit_scale() const { return state_->model.logit_scale; }

std::string Engine::implementation() const { return state_->model.executor->implementation(); }

int Engine::threads() const { return state_->model.executor->threads(); }

std::vector<float> Engine::run(const std::vector<std::uint8_t>& images) {
    state_->require_logits();
    const std::size_t count = state_->count_images(images.size());
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
    state_->require_logits();
    state_->run(images, count, {reinterpret_cast<std::byte*>(logits)});
}

std::map<std::string, std::vector<float>> Engine::run_outputs(const std::vector<std::uint8_t>& images) {
    const std::size_t count = state_->count_images(images.size());
    std::vector<std::vector<std::byte>> room = state_->room_for(count);
    state_->run(images.data(), count, places_in(room));
    std::map<std::string, std::vector<float>> results;
    for (std::size_t i = 0; i < room.size(); ++i) {
        const Output& output = outputs()[i];
        const auto convert = output.type == "int8"    ? scaled<std::int8_t>
                             : output.type == "int16" ? scaled<std::int16_t>
                                                      : scaled<std::int32_t>;
        results.emplace(output.name, convert(room[i], count * output.size, output.scale));
    }
    return results;
}

void Engine::run_outputs_integer(const std::uint8_t* images, std::size_t count, const std::vector<void*>& results) {
    if (results.size() != outputs().size())
        throw Error(std::to_string(results.size()) + " arrays for " + std::to_string(outputs().size()) +
                    " outputs; give one per output");
    std::vector<std::byte*> places;
    for (void* each : results) places.push_back(static_cast<std::byte*>(each));
    state_->run(images, count, places);
}

std::vector<ProfileRow> Engine::profile(const std::uint8_t* images, std::size_t count, int repeats) {
    if (count < 1) throw Error("profile needs at least one image, got none");
    if (repeats < 1) throw Error("repeats is " + std::to_string(repeats) + "; it must be at least 1");
    const std::vector<StepCost>& costs = state_->model.costs;
    std::vector<std::vector<Size>> times(costs.size());
    std::vector<std::vector<std::byte>> room = state_->room_for(count);
    const std::vector<std::byte*> places = places_in(room);
    for (int repeat = 0; repeat < repeats; ++repeat) {
        std::vector<Size> ns(costs.size(), 0);
        state_->run(images, count, places, {&ns, nullptr, nullptr});
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
