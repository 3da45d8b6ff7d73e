#include "engine/plan.h"

#include <algorithm>
#include <map>
#include <set>

#include "engine/process.h"
#include "kernels/buffer.h"
#include "program/rules.h"

namespace swincompress {
namespace {

// Small networks run several images at once, as long as their values stay in a second-level cache.
constexpr Size kChunkBytes = Size{1} << 19;
constexpr Size kChunkMax = 256;

const Value& input_value(const Operation& operation, const std::vector<Value>& values, Size number) {
    if (number < 0 || number >= static_cast<Size>(values.size()))
        throw OperationError(operation,
                             "reads value " + std::to_string(number) + ", which no earlier operation writes");
    return values[static_cast<std::size_t>(number)];
}

OperationView view_of(const Operation& operation, const std::vector<Value>& values) {
    std::vector<Value> inputs;
    for (const Size number : operation.inputs) inputs.push_back(input_value(operation, values, number));
    Value output = check_operation(operation, inputs);
    return {operation, std::move(inputs), std::move(output)};
}

void require_results(const std::vector<std::size_t>& results, std::size_t inputs, std::size_t operations) {
    const std::set<std::size_t> different(results.begin(), results.end());
    if (different.size() != results.size() || *different.begin() < inputs || *different.rbegin() >= inputs + operations)
        throw std::invalid_argument("results must be different outputs of operations");
}

Size tensor_bytes(const Operation& operation) {
    Size bytes = 0;
    for (const auto& [role, tensor] : operation.tensors) bytes += tensor.bytes();
    return bytes;
}

// An upper bound of what a step makes of its tensors: packed weights have their rows and columns rounded up, and biases
// of an attention are spread to all pairs of tokens.
Size prepared_bytes(const OperationView& view) {
    Size bytes = 0;
    if (view.has("weight")) {
        const Size channels = view.attribute("channels");
        bytes += 2 * aligned(channels) * aligned(view.tensor("weight").elements() / channels);
    }
    if (view.has("bias_index")) {
        const Size length = view.input(0).rows() / view.attribute("windows");
        bytes += view.attribute("heads") * length * aligned(length * 4);
    }
    return bytes;
}

}  // namespace

Plan::Plan(std::vector<Value> inputs, const std::vector<Operation>& operations, std::vector<std::size_t> results,
           const Kernels& kernels, const Resources& resources)
    : values_(std::move(inputs)), input_count_(values_.size()), results_(std::move(results)) {
    if (input_count_ == 0 || operations.empty())
        throw std::invalid_argument("a program needs an input and an operation");
    if (results_.empty()) results_.push_back(input_count_ + operations.size() - 1);
    require_results(results_, input_count_, operations.size());
    for (const Value& value : values_) value.bytes();  // refuses impossible shapes
    add_steps(operations, kernels, resources);

    Size one_image = 0;
    lay_out(1, one_image);
    Size given_and_taken = aligned(values_.front().bytes());
    for (const std::size_t number : results_) given_and_taken += aligned(values_[number].bytes());
    one_image = std::max(one_image, given_and_taken);
    chunk_ = std::clamp<Size>(kChunkBytes / one_image, 1, kChunkMax);
    offsets_ = lay_out(chunk_, arena_bytes_);
    for (const PlannedStep& step : steps_)
        scratch_bytes_ = std::max(scratch_bytes_, aligned(step.step->scratch_bytes()));
    const Size left = resources.memory_bytes_max - taken_bytes_;
    // so that a caller who believes the artifact can hold what it gives
    if (given_and_taken > left)
        throw std::invalid_argument("an image and its results take " + std::to_string(given_and_taken) +
                                    " bytes; only " + std::to_string(left) + " are left");
    if (arena_bytes_ > left || scratch_bytes_ > (left - arena_bytes_) / resources.threads)
        throw std::invalid_argument("values between the operations take " + std::to_string(arena_bytes_) +
                                    " bytes and every thread " + std::to_string(scratch_bytes_) + "; only " +
                                    std::to_string(left) + " are left");
}

void Plan::take(const Operation& operation, Size bytes, const Resources& resources) {
    if (bytes > resources.memory_bytes_max - taken_bytes_)
        throw OperationError(operation, "takes " + std::to_string(bytes) + " bytes; only " +
                                            std::to_string(resources.memory_bytes_max - taken_bytes_) + " are left");
    taken_bytes_ += bytes;
}

void Plan::add_steps(const std::vector<Operation>& operations, const Kernels& kernels, const Resources& resources) {
    std::vector<int> readers(input_count_ + operations.size(), 0);
    for (const Operation& operation : operations)
        for (const Size number : operation.inputs)
            if (number >= 0 && number < static_cast<Size>(readers.size())) ++readers[static_cast<std::size_t>(number)];
    for (const std::size_t number : results_) ++readers[number];  // the caller
    std::map<const void*, std::size_t> last_use;                  // of tensors
    for (std::size_t number = 0; number < operations.size(); ++number)
        for (const auto& [role, tensor] : operations[number].tensors) last_use[tensor.data] = number;
    for (std::size_t number = 0; number < operations.size(); ++number) {
        take(operations[number], tensor_bytes(operations[number]), resources);
        const OperationView view = view_of(operations[number], values_);
        take(operations[number], prepared_bytes(view), resources);
        // made even if the previous step takes it in, so that a fused operation is refused for the same faults
        PlannedStep step{make_step(view, kernels), {number}, {}, values_.size(), {SpikeCounter(view)}};
        if (!fuse(view, number, readers)) {
            for (const Size input : operations[number].inputs) step.inputs.push_back(static_cast<std::size_t>(input));
            steps_.push_back(std::move(step));
        }
        values_.push_back(view.output());
        if (!resources.spend) continue;
        for (const auto& [role, tensor] : operations[number].tensors)
            if (last_use[tensor.data] == number) give_back(tensor.data, tensor.bytes());
    }
}

// The previous step takes this operation in, if it is the only reader of that step's output, the caller included.
bool Plan::fuse(const OperationView& view, std::size_t number, const std::vector<int>& readers) {
    if (steps_.empty()) return false;
    PlannedStep& last = steps_.back();
    std::vector<std::size_t> others;
    for (const Size input : view.operation().inputs)
        if (static_cast<std::size_t>(input) != last.output) others.push_back(static_cast<std::size_t>(input));
    const bool reads_last = others.size() + 1 == view.operation().inputs.size();
    // a summand that is repeated over time has fewer rows
    for (const std::size_t other : others)
        if (values_[other].rows() != values_[last.output].rows()) return false;
    if (!reads_last || readers[last.output] != 1 || view.output().rows() != values_[last.output].rows()) return false;
    if (!last.step->fuse(view)) return false;
    last.operations.push_back(number);
    last.counters.emplace_back(view);
    last.inputs.insert(last.inputs.end(), others.begin(), others.end());
    last.output = values_.size();
    return true;
}

// First fit: every value that lives between steps gets the lowest offset that no value alive at the same time covers.
std::vector<Size> Plan::lay_out(Size images, Size& total) const {
    struct Block {
        std::size_t last_use;
        Size first, last;
    };
    std::vector<std::size_t> last_use(values_.size(), 0);
    for (std::size_t number = 0; number < steps_.size(); ++number) {
        last_use[steps_[number].output] = number;
        for (const std::size_t input : steps_[number].inputs) last_use[input] = number;
    }
    std::vector<Block> alive;
    std::vector<Size> offsets(values_.size(), 0);
    total = 0;
    for (std::size_t number = 0; number < steps_.size(); ++number) {
        const std::size_t output = steps_[number].output;
        if (std::find(results_.begin(), results_.end(), output) != results_.end()) continue;
        alive.erase(std::remove_if(alive.begin(), alive.end(), [&](const Block& b) { return b.last_use < number; }),
                    alive.end());
        std::sort(alive.begin(), alive.end(), [](const Block& a, const Block& b) { return a.first < b.first; });
        const Size bytes = aligned(values_[output].bytes() * images);
        Size at = 0;
        for (const Block& block : alive) {
            if (at + bytes <= block.first) break;
            at = std::max(at, block.last);
        }
        alive.push_back({last_use[output], at, at + bytes});
        offsets[output] = at;
        total = std::max(total, at + bytes);
    }
    return offsets;
}

}  // namespace swincompress
