#include "engine/model.h"

namespace swincompress {
namespace {

void require_logits(const Value& result, const Program& program) {
    if (result.declared != ValueType{Type::int32, 2147483647} || result.rows() != 1)
        throw ArtifactError("program ends in " + result.declared.name() + " of shape " + shape_text(result.shape) +
                            "; it must end in int32 logits (classes,)");
    if (program.classes && static_cast<Size>(program.classes->size()) != result.channels())
        throw ArtifactError("program has " + std::to_string(result.channels()) + " logits but names " +
                            std::to_string(program.classes->size()) + " classes");
}

void require_output(const NamedOutput& output, const Value& value) {
    const std::string what = "output '" + output.name + "': ";
    const ValueType& type = value.declared;
    const bool known = type == ValueType{Type::int8, 127} || type == ValueType{Type::int16, 32767} ||
                       type == ValueType{Type::int32, 2147483647};
    if (!known) throw ArtifactError(what + "is " + type.name() + "; it must be one of int8, int16, int32");
    bool fits = !output.shape.empty() && output.shape.back() == value.channels();
    for (const Size size : output.shape) fits = fits && size >= 1 && size <= kElementsMax;
    if (!fits || element_count(output.shape) != value.elements())
        throw ArtifactError(what + "has shape " + shape_text(output.shape) + ", but its value is " +
                            shape_text(value.shape));
}

}  // namespace

void require_threads(int threads) {
    if (threads < 1 || threads > kThreadsMax)
        throw std::invalid_argument("threads is " + std::to_string(threads) + "; it must lie in [1, " +
                                    std::to_string(kThreadsMax) + "]");
}

Model load_model(const std::byte* bytes, std::size_t size, const Kernels& kernels, const Resources& resources) {
    require_threads(resources.threads);
    const Artifact artifact = read_artifact(bytes, size);
    Program program = read_program(artifact);
    for (const auto& [number, tuning] : resources.tunings) {
        if (number >= program.operations.size())
            throw std::invalid_argument("tuning of operation " + std::to_string(number) + " of " +
                                        std::to_string(program.operations.size()));
        program.operations[number].tuning = tuning;
    }
    std::vector<std::size_t> results;
    for (const NamedOutput& output : program.outputs) results.push_back(output.value);
    auto executor = std::make_unique<Executor>(std::vector<Value>{program.input}, program.operations, kernels,
                                               resources, std::move(results));
    const Plan& plan = executor->plan();
    if (program.outputs.empty()) require_logits(plan.value(plan.results().front()), program);
    for (const NamedOutput& output : program.outputs) require_output(output, plan.value(output.value));
    std::vector<StepCost> costs = step_costs(plan, program.operations);
    return {std::move(executor),        program.input,   program.logit_scale, std::move(program.classes),
            std::move(program.outputs), std::move(costs)};
}

}  // namespace swincompress
