// The rules of the specification (spec.md), which spec/kinds.py has for Python: what every kind of operation accepts,
// and what its results cannot exceed, proved from the tensors themselves. Kernels rely on them.
#pragma once

#include <initializer_list>
#include <set>

#include "program/operation.h"

namespace swincompress {

// Type, shape and largest magnitude of the output of `operation` for `inputs`. Throws OperationError, which names the
// operation, the entry and the bound, for a broken rule and for operations that only the NumPy reference runs.
Value check_operation(const Operation& operation, const std::vector<Value>& inputs);

// One operation under check; its attributes, tensors and inputs are checked when they are asked for.
class Call {
public:
    Call(const Operation& operation, const std::vector<Value>& inputs) : operation_(operation), inputs_(inputs) {}

    const Operation& operation() const { return operation_; }
    void require(bool condition, const std::string& message) const;

    // Input `number`, which must be of one of these types or, for a byte, of a narrower one.
    const Value& source(std::size_t number, std::initializer_list<Type> types) const;
    // An output of this shape that saturates to its type, one of these in full width.
    Value output(std::vector<Size> shape, std::initializer_list<Type> types) const;
    // The same, which saturates at the attribute "largest" if it has no sign and there is one; narrow types as well.
    Value bounded(std::vector<Size> shape, std::initializer_list<Type> types);
    // An output of the type of `x`, whose elements are some of those of `x`.
    Value selection(std::vector<Size> shape, const Value& x) const;
    // An output of sums of spikes that do not exceed `reach`, of type uint1 to uint8 or one of `types`.
    Value counts(std::vector<Size> shape, const char* what, Size reach, std::initializer_list<Type> types = {}) const;

    Size integer(const char* name, Size low, Size high);
    Size integer_or(const char* name, Size low, Size high, Size absent);
    std::pair<Size, Size> pair(const char* name, Size low, Size high);

    bool has(const char* role) const { return operation_.tensors.count(role) != 0; }
    bool has_axes(const char* role, std::size_t count) const;
    // A tensor of this type and shape with all elements in [low, high].
    template <typename Element>
    const Element* elements(const char* role, const std::vector<Size>& shape, std::int64_t low, std::int64_t high);
    void requantization(Size channels, const char* mult = "mult", const char* shift = "shift", Size shift_max = 52);
    // Proves |bias| + largest * sum |weight| < 2^31 for every channel. The weight is (channels, depth...), and the bias
    // (channels,), or one row of them per position.
    void accumulator(const Value& x, const std::vector<Size>& weight_shape, const std::vector<Size>& bias_shape);
    // (height, width) of the places where a kernel fits into images (height, width, channels), with time steps or
    // without.
    std::pair<Size, Size> positions(const Value& x, std::pair<Size, Size> kernel);

    // Throws for a tensor or an attribute that was not asked for.
    void nothing_else() const;

private:
    const Operation& operation_;
    const std::vector<Value>& inputs_;
    std::set<std::string> asked_tensors_, asked_attributes_;
};

// The kinds of spiking networks.
Value check_lif(Call& call);
Value check_max_pool(Call& call);
Value check_block_sum(Call& call);
Value check_multiply(Call& call);
Value check_spike_attention(Call& call);
Value check_requantize(Call& call);
Value check_integrate(Call& call);
Value check_fire(Call& call);

constexpr std::int64_t kInt32Max = 2147483647;

}  // namespace swincompress
