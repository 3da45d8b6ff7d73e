#include "model.h"

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
    auto executor =
        std::make_unique<Executor>(std::vector<Value>{program.input}, program.operations, kernels, resources);
    const Plan& plan = executor->plan();
    require_logits(plan.value(plan.result()), program);
    std::vector<StepCost> costs = step_costs(plan, program.operations);
    return {std::move(executor), program.input, program.logit_scale, std::move(program.classes), std::move(costs)};
}

}  // namespace swincompress
