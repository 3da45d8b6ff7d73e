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
        {"linear", make_linear},         {"conv2d", make_conv2d},     {"table", make_table},
        {"layer_norm", make_layer_norm}, {"add", make_add},           {"add_constant", make_add_constant},
        {"gather", make_gather},         {"prepend", make_prepend},   {"mean", make_mean},
        {"attention", make_attention},   {"lif", make_lif},           {"max_pool", make_max_pool},
        {"block_sum", make_block_sum},   {"multiply", make_multiply}, {"spike_attention", make_spike_attention},
        {"requantize", make_requantize},
    };
    const auto found = makers.find(view.operation().kind);
    if (found == makers.end()) throw OperationError(view.operation(), "this engine does not know the kind");
    return found->second(view, kernels);
}

WindowShape window_shape(const OperationView& view) {
    const std::vector<Size>& x = view.input(0).shape;
    view.require(x.size() == 3 || x.size() == 4,
                 "input has shape " + shape_text(x) + "; it must have three or four axes");
    WindowShape shape{};
    shape.in_height = x[x.size() - 3];
    shape.in_width = x[x.size() - 2];
    shape.kernel = view.attribute_pair("kernel", 1, 1024);
    shape.stride = view.attribute_pair("stride", 1, 1024);
    shape.padding = view.attribute_pair("padding", 0, 1024);
    const auto positions = [](Size size, Size kernel, Size stride, Size padding) {
        return size + 2 * padding < kernel ? 0 : (size + 2 * padding - kernel) / stride + 1;
    };
    shape.height = positions(shape.in_height, shape.kernel.first, shape.stride.first, shape.padding.first);
    shape.width = positions(shape.in_width, shape.kernel.second, shape.stride.second, shape.padding.second);
    view.require(shape.height > 0 && shape.width > 0, "kernel is larger than the padded input");
    return shape;
}

}  // namespace swincompress
