#include "artifact/safetensors.h"

#include <algorithm>
#include <array>

#include "artifact/json.h"

namespace swincompress {
namespace {

constexpr std::array<std::pair<const char*, Type>, 5> kTypes = {{
    {"I8", Type::int8},
    {"U8", Type::uint8},
    {"I16", Type::int16},
    {"I32", Type::int32},
    {"I64", Type::int64},
}};

struct Span {
    Size first, last;
};

Json parse_header(const std::byte* bytes, std::size_t size) {
    std::uint64_t header = 0;
    for (std::size_t i = 0; i < 8 && i < size; ++i) header |= static_cast<std::uint64_t>(bytes[i]) << (8 * i);
    if (size < 9 || bytes[8] != std::byte{'{'} || header > (std::uint64_t{1} << 40))
        throw ArtifactError("not a safetensors file; export a model with swincompress_pl.accel.export");
    if (header > kHeaderBytesMax)
        throw ArtifactError("its header takes " + std::to_string(header) + " bytes; at most " +
                            std::to_string(kHeaderBytesMax) + " are read: shorten what the Program's origin tells");
    if (size - 8 < header)
        throw ArtifactError("truncated within its header (" + std::to_string(size) +
                            " bytes); copy or export it again");
    try {
        return parse_json({reinterpret_cast<const char*>(bytes) + 8, static_cast<std::size_t>(header)});
    } catch (const JsonError& error) {
        throw damaged(std::string("its header is not JSON: ") + error.what());
    }
}

std::string metadata_entry(const Json& header, const std::string& key) {
    const Json* metadata = header.find("__metadata__");
    const Json* entry = metadata == nullptr ? nullptr : metadata->find(key);
    if (entry == nullptr || !entry->is(Json::Kind::text))
        throw ArtifactError(
            "a safetensors file, but not an artifact of swincompress_pl (perhaps a model's weights); build the model "
            "and export it with swincompress_pl.accel.export");
    return entry->text;
}

Size whole_number(const std::string& name, const Json& given) {
    const auto value = given.integer();
    if (!value || *value < 0) throw damaged("tensor " + json_text(name) + " has a size or an offset that is none");
    return *value;
}

Type type_of(const std::string& name, const Json* given) {
    for (const auto& [code, type] : kTypes)
        if (given != nullptr && given->says(code)) return type;
    throw damaged("tensor " + json_text(name) + " is of a type that no artifact has");
}

// The tensor called `name`, without its bytes, and where those lie.
std::pair<Tensor, Span> parse_tensor(const std::string& name, const Json& entry) {
    const Json *shape = entry.find("shape"), *offsets = entry.find("data_offsets");
    Tensor tensor{type_of(name, entry.find("dtype")), {}, nullptr};
    const bool listed = shape != nullptr && shape->is(Json::Kind::list) && offsets != nullptr &&
                        offsets->is(Json::Kind::list) && offsets->items.size() == 2;
    if (!listed) throw damaged("tensor " + json_text(name) + " has no shape or no offsets");
    for (const Json& size : shape->items) tensor.shape.push_back(whole_number(name, size));
    const Span span{whole_number(name, offsets->items[0]), whole_number(name, offsets->items[1])};
    Size bytes = 0;
    try {
        bytes = tensor.bytes();
    } catch (const std::invalid_argument& error) {
        throw damaged("tensor " + json_text(name) + ": " + error.what());
    }
    if (span.first > span.last || span.last - span.first != bytes)
        throw damaged("tensor " + json_text(name) + " takes " + std::to_string(bytes) + " bytes, not those at [" +
                      std::to_string(span.first) + ", " + std::to_string(span.last) + ")");
    return {tensor, span};
}

// The tensors must lie one after another, from the first byte behind the header to the last of the file.
void require_seamless(std::vector<Span> spans, Size bytes) {
    std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.first < b.first; });
    Size end = 0;
    for (const Span& span : spans) {
        if (span.first != end) throw damaged("its tensors overlap or leave gaps at byte " + std::to_string(end));
        end = span.last;
    }
    if (end != bytes)
        throw damaged("its tensors take " + std::to_string(end) + " bytes, the file has " + std::to_string(bytes));
}

}  // namespace

ArtifactError damaged(const std::string& what) {
    return ArtifactError("truncated or damaged (" + what + "); copy or export it again");
}

void require_name(const std::string& name, const char* what) {
    if (name.size() > kNameBytesMax)
        throw ArtifactError(std::string("a ") + what + " of " + std::to_string(name.size()) + " bytes; at most " +
                            std::to_string(kNameBytesMax) + " are read");
}

Container read_safetensors(const std::byte* bytes, std::size_t size, const std::string& key,
                           const std::function<void(const std::string&)>& admit) {
    const Json header = parse_header(bytes, size);
    Container container{metadata_entry(header, key), {}};
    admit(container.metadata);
    std::size_t start = 8;
    for (std::size_t i = 0; i < 8; ++i) start += static_cast<std::size_t>(bytes[i]) << (8 * i);
    std::vector<Span> spans;
    for (const JsonMember& member : header.members) {
        if (member.key == "__metadata__") continue;
        require_name(member.key, "tensor name");
        auto [tensor, span] = parse_tensor(member.key, member.value);
        spans.push_back(span);
        tensor.data = bytes + start;  // and the offset, once it is known to lie in the file
        container.tensors.emplace(member.key, std::move(tensor));
    }
    require_seamless(spans, static_cast<Size>(size - start));
    std::size_t number = 0;
    for (auto& [name, tensor] : container.tensors)
        tensor.data = static_cast<const std::byte*>(tensor.data) + spans[number++].first;
    return container;
}

}  // namespace swincompress
