#include <algorithm>

#include "program/rules.h"

namespace swincompress {
namespace {

constexpr Size kMultMax = (Size{1} << 22) - 1;

// The Type that an element type is.
template <typename Element>
constexpr Type type_of = Type::int8;
template <>
constexpr Type type_of<std::uint8_t> = Type::uint8;
template <>
constexpr Type type_of<std::int16_t> = Type::int16;
template <>
constexpr Type type_of<std::int32_t> = Type::int32;
template <>
constexpr Type type_of<std::int64_t> = Type::int64;

bool among(Type type, std::initializer_list<Type> types) {
    return std::find(types.begin(), types.end(), type) != types.end();
}

Size absolute_sum(const std::int8_t* weight, Size count) {
    Size total = 0;
    for (Size first = 0; first < count; first += 1 << 16) {  // sums of this many bytes fit 32 bits
        const Size last = std::min(count, first + (1 << 16));
        std::int32_t sum = 0;
        for (Size i = first; i < last; ++i) sum += weight[i] < 0 ? -weight[i] : weight[i];
        total += sum;
    }
    return total;
}

}  // namespace

void Call::require(bool condition, const std::string& message) const {
    if (!condition) throw OperationError(operation_, message);
}

const Value& Call::source(std::size_t number, std::initializer_list<Type> types) const {
    const Value& value = inputs_[number];
    require(among(value.type(), types), "input " + std::to_string(number) + " is " + value.declared.name());
    return value;
}

Value Call::output(std::vector<Size> shape, std::initializer_list<Type> types) const {
    require(among(operation_.output.type, types), "output is " + operation_.output.name());
    return {operation_.output, std::move(shape), operation_.output.limit};
}

Value Call::bounded(std::vector<Size> shape, std::initializer_list<Type> types) {
    Value value = output(std::move(shape), types);
    if (operation_.attributes.count("largest") == 0) return value;
    require(value.type() == Type::uint8,
            "output is " + value.declared.name() + "; attribute largest is for uint1 to uint8");
    value.largest = integer("largest", 1, value.declared.limit);
    return value;
}

Value Call::selection(std::vector<Size> shape, const Value& x) const {
    require(operation_.output == x.declared,
            "output is " + operation_.output.name() + "; it must be " + x.declared.name() + " as the input");
    return {x.declared, std::move(shape), x.largest, x.below};
}

Value Call::counts(std::vector<Size> shape, const char* what, Size reach, std::initializer_list<Type> types) const {
    const ValueType& type = operation_.output;
    require(type.type == Type::uint8 || among(type.type, types), "output is " + type.name());
    require(reach <= type.limit, std::string(what) + " may reach " + std::to_string(reach) + ", beyond " + type.name());
    return {type, std::move(shape), reach};
}

Size Call::integer(const char* name, Size low, Size high) {
    asked_attributes_.insert(name);
    const auto found = operation_.attributes.find(name);
    require(found != operation_.attributes.end(), std::string("attribute ") + name + " is missing");
    const Attribute& given = found->second;
    const bool inside = !given.is_list && low <= given.values.at(0) && given.values.at(0) <= high;
    require(inside, std::string("attribute ") + name + " is " +
                        (given.is_list ? "a list" : std::to_string(given.values.at(0))) +
                        "; it must be an integer in [" + std::to_string(low) + ", " + std::to_string(high) + "]");
    return given.values[0];
}

Size Call::integer_or(const char* name, Size low, Size high, Size absent) {
    asked_attributes_.insert(name);
    return operation_.attributes.count(name) == 0 ? absent : integer(name, low, high);
}

std::pair<Size, Size> Call::pair(const char* name, Size low, Size high) {
    asked_attributes_.insert(name);
    const auto found = operation_.attributes.find(name);
    const bool two = found != operation_.attributes.end() && found->second.is_list && found->second.values.size() == 2;
    const auto inside = [&](Size value) { return low <= value && value <= high; };
    require(two && inside(found->second.values[0]) && inside(found->second.values[1]),
            std::string("attribute ") + name + " must be two integers in [" + std::to_string(low) + ", " +
                std::to_string(high) + "]");
    return {found->second.values[0], found->second.values[1]};
}

bool Call::has_axes(const char* role, std::size_t count) const {
    const auto found = operation_.tensors.find(role);
    return found != operation_.tensors.end() && found->second.shape.size() == count;
}

template <typename Element>
const Element* Call::elements(const char* role, const std::vector<Size>& shape, std::int64_t low, std::int64_t high) {
    asked_tensors_.insert(role);
    const auto found = operation_.tensors.find(role);
    require(found != operation_.tensors.end(), std::string("tensor '") + role + "' is missing");
    const Tensor& tensor = found->second;
    const Type type = type_of<Element>;
    require(tensor.type == type && tensor.shape == shape,
            std::string("tensor '") + role + "' is " + type_name(tensor.type) + " " + shape_text(tensor.shape) +
                "; it must be " + type_name(type) + " " + shape_text(shape));
    const auto* data = static_cast<const Element*>(tensor.data);
    Element smallest = data[0], largest = data[0];
    const Size count = tensor.elements();
    for (Size i = 0; i < count; ++i) {
        smallest = data[i] < smallest ? data[i] : smallest;
        largest = data[i] > largest ? data[i] : largest;
    }
    require(low <= smallest && largest <= high, std::string("tensor '") + role + "' holds values in [" +
                                                    std::to_string(smallest) + ", " + std::to_string(largest) +
                                                    "]; they must lie in [" + std::to_string(low) + ", " +
                                                    std::to_string(high) + "]");
    return data;
}

template const std::int8_t* Call::elements(const char*, const std::vector<Size>&, std::int64_t, std::int64_t);
template const std::uint8_t* Call::elements(const char*, const std::vector<Size>&, std::int64_t, std::int64_t);
template const std::int16_t* Call::elements(const char*, const std::vector<Size>&, std::int64_t, std::int64_t);
template const std::int32_t* Call::elements(const char*, const std::vector<Size>&, std::int64_t, std::int64_t);
template const std::int64_t* Call::elements(const char*, const std::vector<Size>&, std::int64_t, std::int64_t);

void Call::requantization(Size channels, const char* mult, const char* shift, Size shift_max) {
    elements<std::int32_t>(mult, {channels}, 0, kMultMax);
    elements<std::uint8_t>(shift, {channels}, 1, shift_max);
}

void Call::accumulator(const Value& x, const std::vector<Size>& weight_shape, const std::vector<Size>& bias_shape) {
    const auto* weight = elements<std::int8_t>("weight", weight_shape, -127, 127);
    const auto* bias = elements<std::int32_t>("bias", bias_shape, -kInt32Max - 1, kInt32Max);
    const Size channels = weight_shape[0], depth = element_count(weight_shape) / channels;
    std::vector<Size> peaks(static_cast<std::size_t>(channels), 0);
    const Size rows = element_count(bias_shape) / channels;
    for (Size row = 0; row < rows; ++row)
        for (Size c = 0; c < channels; ++c) {
            Size& peak = peaks[static_cast<std::size_t>(c)];
            peak = std::max(peak, std::abs(static_cast<Size>(*bias++)));
        }
    Size worst = 0;
    for (Size c = 0; c < channels; ++c)
        worst =
            std::max(worst, x.largest * absolute_sum(weight + c * depth, depth) + peaks[static_cast<std::size_t>(c)]);
    require(worst <= kInt32Max, "accumulator may reach " + std::to_string(worst) +
                                    ", beyond int32; the layer is too wide or its bias too large for its scale");
}

std::pair<Size, Size> Call::positions(const Value& x, std::pair<Size, Size> kernel) {
    const std::size_t axes = x.shape.size();
    require(axes == 3 || axes == 4,
            "input has shape " + shape_text(x.shape) + "; a window slides over (height, width, channels)");
    const auto stride = pair("stride", 1, 1024), padding = pair("padding", 0, 1024);
    require(padding.first < kernel.first && padding.second < kernel.second, "padding reaches the kernel");
    const Size free_height = x.shape[axes - 3] + 2 * padding.first - kernel.first;
    const Size free_width = x.shape[axes - 2] + 2 * padding.second - kernel.second;
    require(free_height >= 0 && free_width >= 0, "kernel is larger than the padded input");
    return {free_height / stride.first + 1, free_width / stride.second + 1};
}

void Call::nothing_else() const {
    for (const auto& [role, tensor] : operation_.tensors)
        require(asked_tensors_.count(role) != 0, "unknown tensor '" + role + "'");
    for (const auto& [name, attribute] : operation_.attributes)
        require(asked_attributes_.count(name) != 0, "unknown attribute '" + name + "'");
}

}  // namespace swincompress
