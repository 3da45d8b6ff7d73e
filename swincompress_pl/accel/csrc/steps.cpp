#include "steps.h"

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
    static const std::map<std::string, Maker> makers = {
        {"linear", make_linear},         {"conv2d", make_conv2d},   {"table", make_table},
        {"layer_norm", make_layer_norm}, {"add", make_add},         {"add_constant", make_add_constant},
        {"gather", make_gather},         {"prepend", make_prepend}, {"mean", make_mean},
        {"attention", make_attention},
    };
    const auto found = makers.find(view.operation().kind);
    if (found == makers.end()) throw OperationError(view.operation(), "this engine does not know the kind");
    return found->second(view, kernels);
}

}  // namespace swincompress
