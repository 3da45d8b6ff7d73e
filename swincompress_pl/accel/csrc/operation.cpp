#include "operation.h"

#include <algorithm>
#include <array>

namespace swincompress {
namespace {

constexpr std::array<std::pair<Type, const char*>, 5> kTypes = {{
    {Type::int8, "int8"},
    {Type::uint8, "uint8"},
    {Type::int16, "int16"},
    {Type::int32, "int32"},
    {Type::int64, "int64"},
}};
constexpr Size kValueBytesMax = Size{1} << 40;

}  // namespace

Size type_bytes(Type type) {
    switch (type) {
        case Type::int8:
        case Type::uint8: return 1;
        case Type::int16: return 2;
        case Type::int32: return 4;
        case Type::int64: return 8;
    }
    throw std::logic_error("unknown type");
}

const char* type_name(Type type) {
    for (const auto& [known, name] : kTypes)
        if (known == type) return name;
    throw std::logic_error("unknown type");
}

Type type_from_name(const std::string& name) {
    for (const auto& [type, known] : kTypes)
        if (name == known) return type;
    throw std::invalid_argument("type '" + name + "'; types are int8, uint8, int16, int32 and int64");
}

std::string shape_text(const std::vector<Size>& shape) {
    std::string text = "(";
    for (const Size size : shape) text += std::to_string(size) + ",";
    return text + ")";
}

Size element_count(const std::vector<Size>& shape) {
    Size count = 1;
    for (const Size size : shape) {
        if (size < 1 || size > kValueBytesMax / count)
            throw std::invalid_argument("shape " + shape_text(shape) + " is empty, negative or too large");
        count *= size;
    }
    return count;
}

Size Value::channels() const { return shape.at(shape.size() - 1); }

Size Value::rows() const { return element_count({shape.begin(), shape.end() - 1}); }

Size Value::bytes() const { return element_count(shape) * type_bytes(type); }

void OperationView::require(bool condition, const std::string& message) const {
    if (!condition) throw OperationError(operation_, message);
}

void OperationView::require_arity(std::size_t count) const {
    require(inputs_.size() == count,
            "takes " + std::to_string(count) + " inputs, got " + std::to_string(inputs_.size()));
}

void OperationView::require_input(std::size_t number, std::initializer_list<Type> types) const {
    const Type given = input(number).type;
    require(std::find(types.begin(), types.end(), given) != types.end(),
            "input " + std::to_string(number) + " is " + type_name(given));
}

void OperationView::require_output(std::initializer_list<Type> types, const std::vector<Size>& shape) const {
    require(std::find(types.begin(), types.end(), output().type) != types.end(),
            std::string("output is ") + type_name(output().type));
    require(output().shape == shape,
            "output has shape " + shape_text(output().shape) + "; it must be " + shape_text(shape));
}

Size OperationView::attribute(const std::string& name, Size low, Size high) const {
    const auto found = operation_.attributes.find(name);
    require(found != operation_.attributes.end() && found->second.size() == 1, "attribute " + name + " is missing");
    const Size value = found->second[0];
    require(low <= value && value <= high, "attribute " + name + " is " + std::to_string(value) + "; it must lie in [" +
                                               std::to_string(low) + ", " + std::to_string(high) + "]");
    return value;
}

std::pair<Size, Size> OperationView::attribute_pair(const std::string& name, Size low, Size high) const {
    const auto found = operation_.attributes.find(name);
    require(found != operation_.attributes.end() && found->second.size() == 2, "attribute " + name + " is missing");
    for (const Size value : found->second)
        require(low <= value && value <= high, "attribute " + name + " is out of range");
    return {found->second[0], found->second[1]};
}

const Tensor& OperationView::tensor(const std::string& role, Type type, const std::vector<Size>& shape) const {
    const auto found = operation_.tensors.find(role);
    require(found != operation_.tensors.end(), "tensor '" + role + "' is missing");
    require(found->second.type == type && found->second.shape == shape,
            "tensor '" + role + "' is " + type_name(found->second.type) + " " + shape_text(found->second.shape) +
                "; it must be " + type_name(type) + " " + shape_text(shape));
    return found->second;
}

}  // namespace swincompress
