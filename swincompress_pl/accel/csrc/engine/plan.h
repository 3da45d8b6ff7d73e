// A Program that is ready to run: steps in order, fused if that is free, and one arena for all values between them.
#pragma once

#include <map>

#include "engine/spike_counter.h"

namespace swincompress {

struct PlannedStep {
    std::unique_ptr<Step> step;
    std::vector<std::size_t> operations;  // numbers of the operations it covers
    std::vector<std::size_t> inputs;      // numbers of values
    std::size_t output;
    std::vector<SpikeCounter> counters;  // one per operation
};

// What an engine may use: threads, and memory besides the caller's arrays.
struct Resources {
    int threads = 1;
    Size memory_bytes_max = Size{1} << 32;
    // Whether the tensors lie in memory that nobody reads afterwards: each is given back once its last operation is
    // prepared, so that artifact and engine are not in memory at once.
    bool spend = false;
    // By the number of the operation.
    std::map<std::size_t, Tuning> tunings = {};
};

class Plan {
public:
    // A caller gives the values `inputs` and gets `results`, numbers of values that operations write, each once;
    // without them, the output of the last operation. Throws OperationError for an operation that breaks a rule of the
    // specification or takes more memory than the limit.
    Plan(std::vector<Value> inputs, const std::vector<Operation>& operations, std::vector<std::size_t> results,
         const Kernels& kernels, const Resources& resources);

    const std::vector<PlannedStep>& steps() const { return steps_; }
    const Value& value(std::size_t number) const { return values_[number]; }
    std::size_t value_count() const { return values_.size(); }
    std::size_t input_count() const { return input_count_; }
    // Numbers of the values that the caller gets, in the order in which it asked for them.
    const std::vector<std::size_t>& results() const { return results_; }

    Size chunk() const { return chunk_; }                  // images that run through all steps together
    Size arena_bytes() const { return arena_bytes_; }      // for one chunk
    Size scratch_bytes() const { return scratch_bytes_; }  // for one thread
    // Where a value between the steps lies in the arena; a result lies in the caller's memory.
    Size offset(std::size_t value) const { return offsets_[value]; }

private:
    void add_steps(const std::vector<Operation>& operations, const Kernels& kernels, const Resources& resources);
    bool fuse(const OperationView& view, std::size_t number, const std::vector<int>& readers);
    std::vector<Size> lay_out(Size images, Size& total) const;
    void take(const Operation& operation, Size bytes, const Resources& resources);

    std::vector<Value> values_;
    std::size_t input_count_;
    std::vector<std::size_t> results_;
    std::vector<PlannedStep> steps_;
    std::vector<Size> offsets_;
    Size chunk_ = 1;
    Size arena_bytes_ = 0;
    Size scratch_bytes_ = 0;
    Size taken_bytes_ = 0;  // by steps, at most
};

}  // namespace swincompress
