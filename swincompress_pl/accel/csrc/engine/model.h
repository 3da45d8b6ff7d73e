// An artifact that is ready to run: what both the public header and Python load.
#pragma once

#include "artifact/reader.h"
#include "engine/costs.h"
#include "engine/executor.h"

namespace swincompress {

struct Model {
    std::unique_ptr<Executor> executor;
    Value input;
    double logit_scale;
    std::optional<std::vector<std::string>> classes;
    std::vector<NamedOutput> outputs;  // empty where the one result are logits
    std::vector<StepCost> costs;       // of the executor's steps

    const Value& result(std::size_t number) const {
        return executor->plan().value(executor->plan().results().at(number));
    }
    // 0 where outputs are named
    Size class_count() const { return outputs.empty() ? result(0).channels() : 0; }
};

// Throws std::invalid_argument for a number of threads outside [1, kThreadsMax].
void require_threads(int threads);

// Throws ArtifactError or OperationError for bytes that are not an artifact, or that break a rule of the specification.
// Borrows nothing from the bytes.
Model load_model(const std::byte* bytes, std::size_t size, const Kernels& kernels, const Resources& resources);

}  // namespace swincompress
