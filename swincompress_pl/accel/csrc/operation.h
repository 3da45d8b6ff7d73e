// A Program as the engine receives it: values and operations as plain data, from Python or, later, from a reader in
// C++.
#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace swincompress {

// Type and shape of a value of one image: (rows..., channels). largest: what a uint8 value never exceeds, as the norm
// has proved it for spikes and counts; were it wrong, answers would be, but no address.
struct Value {
    Type type;
    std::vector<Size> shape;
    Size largest = 255;

    Size channels() const;
    Size rows() const;
    Size elements() const { return rows() * channels(); }
    Size bytes() const;
};

// Borrowed: the owner keeps `data` alive until the plan is made; steps copy what they keep.
struct Tensor {
    Type type;
    std::vector<Size> shape;
    const void* data;
};

struct Operation {
    std::string kind;
    std::string name;
    std::vector<Size> inputs;  // numbers of values: first the inputs of the program, then one an operation, in order
    Value output;
    std::map<std::string, std::vector<Size>> attributes;
    std::map<std::string, Tensor> tensors;
};

// An operation contradicts itself; the message names it.
struct OperationError : std::invalid_argument {
    OperationError(const Operation& operation, const std::string& message)
        : std::invalid_argument(operation.kind + " '" + operation.name + "': " + message) {}
};

Size type_bytes(Type type);
const char* type_name(Type type);
Type type_from_name(const std::string& name);
std::string shape_text(const std::vector<Size>& shape);

// Checked access to the parts of one operation.
class OperationView {
public:
    OperationView(const Operation& operation, std::vector<Value> inputs)
        : operation_(operation), inputs_(std::move(inputs)) {}

    const Operation& operation() const { return operation_; }
    const Value& input(std::size_t number) const { return inputs_.at(number); }
    const Value& output() const { return operation_.output; }

    void require(bool condition, const std::string& message) const;
    void require_arity(std::size_t count) const;
    void require_input(std::size_t number, std::initializer_list<Type> types) const;
    void require_output(std::initializer_list<Type> types, const std::vector<Size>& shape) const;

    Size attribute(const std::string& name, Size low, Size high) const;
    // (vertical, horizontal)
    std::pair<Size, Size> attribute_pair(const std::string& name, Size low, Size high) const;

    bool has(const std::string& role) const { return operation_.tensors.count(role) != 0; }
    const Tensor& tensor(const std::string& role, Type type, const std::vector<Size>& shape) const;
    // The tensor's elements, checked to lie in [low, high].
    template <typename Element>
    const Element* elements(const std::string& role, Type type, const std::vector<Size>& shape, std::int64_t low,
                            std::int64_t high) const;

private:
    const Operation& operation_;
    std::vector<Value> inputs_;
};

Size element_count(const std::vector<Size>& shape);

template <typename Element>
const Element* OperationView::elements(const std::string& role, Type type, const std::vector<Size>& shape,
                                       std::int64_t low, std::int64_t high) const {
    const auto* data = static_cast<const Element*>(tensor(role, type, shape).data);
    const Size count = element_count(shape);
    for (Size i = 0; i < count; ++i)
        if (data[i] < low || data[i] > high)
            throw OperationError(operation_, "tensor '" + role + "' holds " + std::to_string(data[i]) +
                                                 "; it must lie in [" + std::to_string(low) + ", " +
                                                 std::to_string(high) + "]");
    return data;
}

}  // namespace swincompress
