#include "engine/steps.h"

#include <algorithm>
#include <map>

namespace swincompress {

Range share(Size total, Size unit, int part, int parts) {
    const Size units = (total + unit - 1) / unit;
    const Size first = units * part / parts * unit, last = units * (part + 1) / parts * unit;
    return {std::min(first, total), std::min(last, total)};
}

std::unique_ptr<Step> make_step(const OperationView& view, const Kernels& kernels) {
    using Maker = std::unique_ptr<Step> (*)(const OperationView&, const Kernels&);
    // Never destroyed, because a thread may load while the process ends.
    static const auto& makers = *new std::map<std::string, Maker>{
        {"linear", make_linear},
        {"conv2d", make_conv2d},
        {"table", make_table},
        {"layer_norm", make_layer_norm},
        {"add", make_add},
        {"add_constant", make_add_constant},
        {"gather", make_gather},
        {"prepend", make_prepend},
        {"mean", make_mean},
        {"attention", make_attention},
        {"lif", make_lif},
        {"max_pool", make_max_pool},
        {"block_sum", make_block_sum},
        {"multiply", make_multiply},
        {"spike_attention", make_spike_attention},
        {"requantize", make_requantize},
        {"softmax", make_softmax},
        {"integrate", make_integrate},
        {"fire", make_fire},
    };
    return makers.at(view.operation().kind)(view, kernels);
}

WindowShape window_shape(const OperationView& view) {
    const std::vector<Size>&x = view.input(0).shape, &y = view.output().shape;
    return {x[x.size() - 3],
            x[x.size() - 2],
            y[y.size() - 3],
            y[y.size() - 2],
            view.attribute_pair("kernel"),
            view.attribute_pair("stride"),
            view.attribute_pair("padding")};
}

}  // namespace swincompress
