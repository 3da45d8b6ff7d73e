// A Program as the engine receives it: values and operations as plain data, from the reader or from Python.
#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace swincompress {

// A type of the specification: the type that holds a value, and its largest magnitude. uint2 is a byte of at most 3.
struct ValueType {
    Type type;
    Size limit;

    bool operator==(const ValueType& other) const { return type == other.type && limit == other.limit; }
    bool operator!=(const ValueType& other) const { return !(*this == other); }
    // Narrower than what holds it.
    bool narrow() const;
    std::string name() const;
};

// Type and shape of a value of one image: (rows..., channels). No element exceeds `largest` in magnitude, as
// check_operation proves it; without a smaller bound it is the type's limit. No int8 element is less than -below.
struct Value {
    ValueType declared;
    std::vector<Size> shape;
    Size largest;
    Size below = 128;

    Type type() const { return declared.type; }
    Size channels() const { return shape.back(); }
    Size rows() const;
    Size elements() const;
    Size bytes() const;
};

// The data are borrowed: the owner keeps them alive, and aligned for their type, until the plan is made. Steps copy
// what they keep.
struct Tensor {
    Type type;
    std::vector<Size> shape;
    const void* data;

    Size elements() const;
    Size bytes() const;
};

// An integer, or a pair of them.
struct Attribute {
    std::vector<Size> values;
    bool is_list;
};

// How a layer runs on this machine, where that was measured; its integers are the same for all.
struct Tuning {
    Size block_bytes = 0;          // LinearLayer::block_bytes; 0 for a size by the second-level cache
    Size events_max_percent = -1;  // Kernels::events_max_percent; -1 for the implementation's
};

struct Operation {
    std::string kind;
    std::string name;
    std::vector<Size> inputs;  // numbers of values: first the inputs of the program, then one per operation, in order
    ValueType output;
    std::map<std::string, Attribute> attributes;
    std::map<std::string, Tensor> tensors;
    Tuning tuning;
};

// An operation contradicts itself or breaks a bound; the message names it.
struct OperationError : std::invalid_argument {
    OperationError(const Operation& operation, const std::string& message)
        : std::invalid_argument(operation.kind + " '" + operation.name + "': " + message) {}
};

Size type_bytes(Type type);
const char* type_name(Type type);
Type type_from_name(const std::string& name);
// The type of that name, narrow or not. Throws std::invalid_argument for an unknown name.
ValueType value_type_from_name(const std::string& name);
std::string shape_text(const std::vector<Size>& shape);

// The limit of one value of one image. With it, no product of sizes, limits and weights exceeds 64 bits.
constexpr Size kElementsMax = Size{1} << 32;
// The number of elements; throws std::invalid_argument for a size below 1 and beyond kElementsMax elements.
Size element_count(const std::vector<Size>& shape);

// The parts of one operation that check_operation (rules.h) has accepted.
class OperationView {
public:
    OperationView(const Operation& operation, std::vector<Value> inputs, Value output)
        : operation_(operation), inputs_(std::move(inputs)), output_(std::move(output)) {}

    const Operation& operation() const { return operation_; }
    const Value& input(std::size_t number) const { return inputs_.at(number); }
    const Value& output() const { return output_; }

    Size attribute(const std::string& name) const { return operation_.attributes.at(name).values.at(0); }
    Size attribute_or(const std::string& name, Size absent) const {
        return operation_.attributes.count(name) != 0 ? attribute(name) : absent;
    }
    // (vertical, horizontal)
    std::pair<Size, Size> attribute_pair(const std::string& name) const {
        const std::vector<Size>& values = operation_.attributes.at(name).values;
        return {values.at(0), values.at(1)};
    }

    bool has(const std::string& role) const { return operation_.tensors.count(role) != 0; }
    const Tensor& tensor(const std::string& role) const { return operation_.tensors.at(role); }
    template <typename Element>
    const Element* elements(const std::string& role) const {
        return static_cast<const Element*>(tensor(role).data);
    }

private:
    const Operation& operation_;
    std::vector<Value> inputs_;
    Value output_;
};

}  // namespace swincompress
