// From an artifact's description to operations.
#include <algorithm>
#include <cmath>

#include "artifact/reader.h"

namespace swincompress {
namespace {

constexpr Size kNormVersionMax = 2;  // version 2 has named outputs

ArtifactError incomplete(const std::string& what) {
    return ArtifactError("program description is incomplete or ill-typed: " + what + "; export it again");
}

const Json& entry_of(const Json& object, const char* key, Json::Kind kind) {
    const Json* found = object.find(key);
    if (found == nullptr || !found->is(kind)) throw incomplete(std::string("entry '") + key + "'");
    return *found;
}

Size size_of(const Json& object, const char* key) {
    const auto size = entry_of(object, key, Json::Kind::number).integer();
    if (!size || *size < 1) throw incomplete(std::string("entry '") + key + "' is not a positive integer");
    return *size;
}

Value parse_input(const Json& given) {
    const Json &dtype = entry_of(given, "dtype", Json::Kind::text), &axes = entry_of(given, "axes", Json::Kind::text);
    const bool events = axes.text == "NTHWC";
    if (dtype.text != "uint8" || (axes.text != "NHWC" && !events))
        throw ArtifactError("program input is " + dtype.text + " " + axes.text +
                            "; only uint8 NHWC (images) and NTHWC (events) are known");
    Value value{{Type::uint8, 255}, {}, 255};
    if (events) value.shape.push_back(size_of(given, "time_steps"));
    for (const char* key : {"height", "width", "channels"}) value.shape.push_back(size_of(given, key));
    entry_of(given, "preprocessing", Json::Kind::object);
    value.elements();
    return value;
}

// A positive number as Python's float.hex writes it: 0x1.8p-10. No library function parses that in every locale.
double parse_scale(const std::string& text, const std::string& what) {
    const auto refuse = [&] { return ArtifactError(what + " is '" + text + "'; it must be positive and finite"); };
    std::size_t at = 2;
    const bool normal = text.size() > 3 && (text[2] == '0' || text[2] == '1') && (text[3] == '.' || text[3] == 'p');
    if (text.compare(0, 2, "0x") != 0 || !normal) throw refuse();  // at most 53 bits, so no digit is rounded
    std::uint64_t mantissa = 0;
    int digits = 0, after_point = 0;
    bool point = false;
    for (; at < text.size() && text[at] != 'p'; ++at) {
        const std::size_t digit = std::string("0123456789abcdef").find(text[at]);
        if (text[at] == '.' && !point && digits > 0) {
            point = true;
        } else if (digit != std::string::npos && ++digits <= 14) {
            mantissa = mantissa << 4 | digit;
            after_point += point ? 1 : 0;
        } else {
            throw refuse();
        }
    }
    const bool negative = at + 1 < text.size() && text[at + 1] == '-';
    const bool sign = negative || (at + 1 < text.size() && text[at + 1] == '+');
    int exponent = 0;
    std::size_t first = at + (sign ? 2 : 1);
    if (digits == 0 || first >= text.size() || text.size() - first > 4) throw refuse();
    for (; first < text.size(); ++first) {
        if (text[first] < '0' || text[first] > '9') throw refuse();
        exponent = 10 * exponent + (text[first] - '0');
    }
    const double scale = std::ldexp(static_cast<double>(mantissa), (negative ? -exponent : exponent) - 4 * after_point);
    if (!(std::isfinite(scale) && scale > 0)) throw refuse();
    return scale;
}

// Numbers the values by name, and turns the operations, in order, into data over numbers.
class OperationReader {
public:
    explicit OperationReader(const Artifact& artifact) : artifact_(artifact) { numbers_.emplace("images", 0); }

    Operation read(const Json& entry) {
        Operation operation{};
        operation.kind = entry_of(entry, "kind", Json::Kind::text).text;
        operation.name = entry_of(entry, "name", Json::Kind::text).text;
        require_name(operation.kind, "kind");
        require_name(operation.name, "name");
        try {
            operation.output = value_type_from_name(entry_of(entry, "dtype", Json::Kind::text).text);
        } catch (const std::invalid_argument& error) {
            throw OperationError(operation, error.what());
        }
        for (const Json& name : entry_of(entry, "inputs", Json::Kind::list).items)
            operation.inputs.push_back(number_of(operation, name));
        for (const JsonMember& member : entry_of(entry, "attributes", Json::Kind::object).members)
            operation.attributes[member.key] = attribute_of(operation, member);
        for (const JsonMember& member : entry_of(entry, "tensors", Json::Kind::object).members)
            operation.tensors.emplace(member.key, tensor_of(operation, member));
        const std::string& output = entry_of(entry, "output", Json::Kind::text).text;
        require_name(output, "name of an output");
        if (!numbers_.emplace(output, static_cast<Size>(numbers_.size())).second)
            throw OperationError(operation, "writes " + json_text(output) + " a second time");
        return operation;
    }

    // In the order of the file. Types and shapes of the values are not known here.
    std::vector<NamedOutput> read_outputs(const std::vector<Json>& entries) const {
        if (entries.empty() || entries.size() > kOutputsMax)
            throw ArtifactError("program of " + std::to_string(entries.size()) + " outputs; it must have 1 to " +
                                std::to_string(kOutputsMax));
        std::vector<NamedOutput> outputs;
        for (const Json& entry : entries) {
            NamedOutput output = read_output(entry);
            for (const NamedOutput& earlier : outputs) {
                if (earlier.name == output.name) throw ArtifactError("output '" + output.name + "': its name is taken");
                if (earlier.value == output.value)
                    throw ArtifactError("output '" + output.name + "': gives " + json_text(*entry.find("value")) +
                                        ", as an earlier output does");
            }
            outputs.push_back(std::move(output));
        }
        return outputs;
    }

private:
    NamedOutput read_output(const Json& entry) const {
        NamedOutput output{entry_of(entry, "name", Json::Kind::text).text, 0, 1, {}};
        require_name(output.name, "name of an output");
        if (output.name.empty()) throw ArtifactError("output '': its name is empty");
        const std::string what = "output '" + output.name + "': ";
        const Json& value = entry_of(entry, "value", Json::Kind::text);
        require_name(value.text, "name of a value");
        const auto found = numbers_.find(value.text);
        if (found == numbers_.end() || found->second == 0)
            throw ArtifactError(what + "gives " + json_text(value) + ", which no operation writes");
        output.value = static_cast<std::size_t>(found->second);
        output.scale = parse_scale(entry_of(entry, "scale", Json::Kind::text).text, what + "its scale");
        for (const Json& size : entry_of(entry, "shape", Json::Kind::list).items) {
            const auto number = size.integer();
            if (!number) throw incomplete("entry 'shape' holds " + json_text(size));
            output.shape.push_back(*number);
        }
        return output;
    }

    Size number_of(const Operation& operation, const Json& name) const {
        const auto found = name.is(Json::Kind::text) ? numbers_.find(name.text) : numbers_.end();
        if (found == numbers_.end())
            throw OperationError(operation, "reads " + json_text(name) + ", which no earlier operation writes");
        return found->second;
    }

    static Attribute attribute_of(const Operation& operation, const JsonMember& member) {
        Attribute attribute{{}, member.value.is(Json::Kind::list)};
        const auto add = [&](const Json& value) {
            const auto integer = value.integer();
            if (!integer)
                throw OperationError(operation, "attribute " + member.key + " is " + json_text(value) +
                                                    "; attributes are integers or lists of them");
            attribute.values.push_back(*integer);
        };
        if (attribute.is_list)
            for (const Json& item : member.value.items) add(item);
        else
            add(member.value);
        return attribute;
    }

    const Tensor& tensor_of(const Operation& operation, const JsonMember& member) const {
        const auto found =
            member.value.is(Json::Kind::text) ? artifact_.tensors.find(member.value.text) : artifact_.tensors.end();
        if (found == artifact_.tensors.end())
            throw OperationError(operation, "tensor " + json_text(member.value) + " is not in the program");
        return found->second;
    }

    const Artifact& artifact_;
    std::map<std::string, Size> numbers_;
};

std::optional<std::vector<std::string>> parse_classes(const Json& description) {
    const Json* given = description.find("classes");
    if (given != nullptr && given->is(Json::Kind::null)) return std::nullopt;
    std::vector<std::string> classes;
    for (const Json& name : entry_of(description, "classes", Json::Kind::list).items) {
        if (!name.is(Json::Kind::text)) throw incomplete("a class name is not a string");
        require_name(name.text, "class name");
        classes.push_back(name.text);
    }
    return classes;
}

// The bytes that an engine makes of an operation's tensors: a tensor that several operations read is copied for each,
// rows of weights are rounded up, and biases of an attention are spread to all pairs of tokens. A product of doubles
// cannot overflow.
double prepared_bytes(const Operation& operation) {
    double bytes = 0;
    for (const auto& [role, tensor] : operation.tensors) bytes += static_cast<double>(tensor.bytes());
    const auto has = [&](const char* role) { return operation.tensors.count(role) != 0; };
    const auto rows = [&](const char* role) {
        const Tensor& tensor = operation.tensors.at(role);
        return std::max<Size>(1, tensor.shape.empty() ? 1 : tensor.shape.front());
    };
    const auto aligned = [](Size size) { return static_cast<double>((size + 63) / 64 * 64); };
    if (has("weight")) {
        const Size elements = operation.tensors.at("weight").elements();
        bytes += 2 * aligned(rows("weight")) * aligned(elements / rows("weight"));
    }
    if (has("bias_table") && has("bias_index"))
        bytes +=
            static_cast<double>(rows("bias_table")) * static_cast<double>(operation.tensors.at("bias_index").bytes());
    return bytes;
}

void require_bounded(const Program& program, const Artifact& artifact) {
    double stored = 0, prepared = 0;
    for (const auto& [key, tensor] : artifact.tensors) stored += static_cast<double>(tensor.bytes());
    for (const Operation& operation : program.operations) prepared += prepared_bytes(operation);
    const double limit = static_cast<double>(kPreparedBytesFree) + kPreparedRatioMax * stored;
    if (prepared > limit)
        throw ArtifactError("its operations make " + std::to_string(static_cast<Size>(std::min(prepared, 9e18))) +
                            " bytes of their tensors; at most " + std::to_string(static_cast<Size>(limit)) +
                            " are accepted for tensors of its size");
}

}  // namespace

void require_norm_version(const Json& description) {
    const Json* version = description.find("norm_version");
    const auto number = version == nullptr ? std::nullopt : version->integer();
    if (!number || *number < 1 || *number > kNormVersionMax)
        throw ArtifactError(
            "program of specification version " + (version == nullptr ? "none" : json_text(*version)) +
            "; this package runs versions 1 and 2: export the model again with this package, or install the "
            "package that wrote it");
}

Program read_program(const Artifact& artifact) {
    const Json& description = artifact.description;
    require_norm_version(description);
    Program program{};
    try {
        program.input = parse_input(entry_of(description, "input", Json::Kind::object));
    } catch (const ArtifactError&) {
        throw;
    } catch (const std::invalid_argument& error) {
        throw ArtifactError(std::string("program input: ") + error.what());
    }
    const bool named = description.find("norm_version")->integer() == kNormVersionMax;
    program.logit_scale =
        named ? 1 : parse_scale(entry_of(description, "logit_scale", Json::Kind::text).text, "logit_scale");
    if (!named) program.classes = parse_classes(description);
    entry_of(description, "origin", Json::Kind::object);
    const std::vector<Json>& operations = entry_of(description, "operations", Json::Kind::list).items;
    if (operations.empty() || operations.size() > kOperationsMax)
        throw ArtifactError("program of " + std::to_string(operations.size()) + " operations; it must have 1 to " +
                            std::to_string(kOperationsMax));
    OperationReader reader(artifact);
    for (const Json& entry : operations) program.operations.push_back(reader.read(entry));
    if (named) program.outputs = reader.read_outputs(entry_of(description, "outputs", Json::Kind::list).items);
    require_bounded(program, artifact);
    return program;
}

}  // namespace swincompress
