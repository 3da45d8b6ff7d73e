#include "engine/costs.h"

#include <algorithm>
#include <set>

namespace swincompress {
namespace {

Size attention_macs(const Operation& operation, const Value& x) {
    const auto attribute = [&](const char* name) { return operation.attributes.at(name).values.at(0); };
    return x.rows() * (x.rows() / attribute("windows")) * attribute("heads") *
           (attribute("qk_dim") + attribute("v_dim"));
}

// The count of the cheaper of the two orders.
Size spike_attention_macs(const Operation& operation, const Value& q, const Value& v) {
    const Size windows = operation.attributes.at("windows").values.at(0);
    const Size heads = operation.attributes.at("heads").values.at(0);
    const Size length = q.rows() / windows, qk_dim = q.channels() / heads, v_dim = v.channels() / heads;
    return windows * heads * length * std::min(length * (qk_dim + v_dim), 2 * qk_dim * v_dim);
}

Size macs_of(const Plan& plan, const Operation& operation, const Value& output) {
    const auto input = [&](std::size_t number) -> const Value& {
        return plan.value(static_cast<std::size_t>(operation.inputs.at(number)));
    };
    if (operation.kind == "attention") return attention_macs(operation, input(0));
    if (operation.kind == "spike_attention") return spike_attention_macs(operation, input(0), input(2));
    if (operation.kind != "linear" && operation.kind != "conv2d") return 0;
    return output.rows() * operation.tensors.at("weight").elements();
}

}  // namespace

std::vector<StepCost> step_costs(const Plan& plan, const std::vector<Operation>& operations) {
    std::vector<StepCost> costs;
    for (const PlannedStep& step : plan.steps()) {
        StepCost cost{{}, {}, 0, plan.value(step.output).bytes(), 0};
        std::set<const void*> seen;
        for (const std::size_t number : step.operations) {
            const Operation& operation = operations[number];
            const char* joined = cost.operation.empty() && cost.kind.empty() ? "" : "+";
            cost.operation += joined + operation.name;
            cost.kind += joined + operation.kind;
            cost.macs += macs_of(plan, operation, plan.value(plan.input_count() + number));
            for (const auto& [role, tensor] : operation.tensors)
                if (seen.insert(tensor.data).second) cost.tensor_bytes += tensor.bytes();
        }
        for (const std::size_t input : std::set<std::size_t>(step.inputs.begin(), step.inputs.end()))
            cost.image_bytes += plan.value(input).bytes();
        costs.push_back(std::move(cost));
    }
    return costs;
}

}  // namespace swincompress
