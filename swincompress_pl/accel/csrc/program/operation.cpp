#include "program/operation.h"

#include <array>

namespace swincompress {
namespace {

struct KnownType {
    Type type;
    const char* name;
    Size limit;
};

constexpr std::array<KnownType, 5> kTypes = {{
    {Type::int8, "int8", 127},
    {Type::uint8, "uint8", 255},
    {Type::int16, "int16", 32767},
    {Type::int32, "int32", 2147483647},
    {Type::int64, "int64", 9223372036854775807},
}};

const KnownType& known(Type type) {
    for (const KnownType& each : kTypes)
        if (each.type == type) return each;
    throw std::logic_error("unknown type");
}

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

const char* type_name(Type type) { return known(type).name; }

Type type_from_name(const std::string& name) {
    for (const KnownType& each : kTypes)
        if (name == each.name) return each.type;
    throw std::invalid_argument("type '" + name + "'; types are int8, uint8, int16, int32 and int64");
}

ValueType value_type_from_name(const std::string& name) {
    for (const KnownType& each : kTypes)
        if (name == each.name && each.type != Type::int64) return {each.type, each.limit};
    for (int bits = 1; bits < 8; ++bits) {
        if (name == "uint" + std::to_string(bits)) return {Type::uint8, (Size{1} << bits) - 1};
        if (bits > 1 && name == "int" + std::to_string(bits)) return {Type::int8, (Size{1} << (bits - 1)) - 1};
    }
    throw std::invalid_argument("value of type '" + name +
                                "'; types are int2 to int8, uint1 to uint8, int16 and int32");
}

bool ValueType::narrow() const { return limit < known(type).limit; }

std::string ValueType::name() const {
    if (!narrow()) return known(type).name;
    int bits = type == Type::uint8 ? 0 : 1;
    for (Size rest = limit; rest > 0; rest /= 2) ++bits;
    return (type == Type::uint8 ? "uint" : "int") + std::to_string(bits);
}

std::string shape_text(const std::vector<Size>& shape) {
    std::string text = "(";
    for (const Size size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + (shape.size() == 1 ? ",)" : ")");
}

Size element_count(const std::vector<Size>& shape) {
    Size count = 1;
    for (const Size size : shape) {
        if (size < 1 || size > kElementsMax / count)
            throw std::invalid_argument("shape " + shape_text(shape) + " is empty, negative or too large");
        count *= size;
    }
    return count;
}

Size Value::rows() const { return element_count({shape.begin(), shape.end() - 1}); }

Size Value::elements() const { return element_count(shape); }

Size Value::bytes() const { return elements() * type_bytes(type()); }

Size Tensor::elements() const { return element_count(shape); }

Size Tensor::bytes() const { return elements() * type_bytes(type); }

}  // namespace swincompress
