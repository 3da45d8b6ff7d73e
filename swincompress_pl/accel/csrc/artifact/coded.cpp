#include "artifact/coded.h"

#include <algorithm>

#include "artifact/coders.h"
#include "artifact/expand.h"
#include "artifact/storage.h"

namespace swincompress {
namespace {

constexpr const char* kContent = "content";
// Tensors may decode to the free bytes, and beyond them to so many times their streams. A description likewise.
constexpr Size kDecodedBytesFree = Size{1} << 24, kDecodedRatioMax = 128;
constexpr Size kJsonBytesMax = Size{1} << 24, kJsonBytesFree = Size{1} << 20, kJsonRatioMax = 64;

void require_bounded(Size decoded, Size coded) {
    const Size limit = kDecodedBytesFree + kDecodedRatioMax * coded;
    if (decoded > limit)
        throw damaged(std::to_string(coded) + " coded bytes declare " + std::to_string(decoded) + "; at most " +
                      std::to_string(limit) + " are accepted");
}

// With room for one byte more, which reveals a stream that is too long.
Buffer decoded(const Json* coder, const Tensor& stream, Size bytes) {
    if (coder == nullptr || !coder->is(Json::Kind::text)) throw damaged("a stream has no coder");
    if (bytes < 0 || stream.type != Type::uint8 || stream.shape.size() != 1)
        throw damaged("a stream's declaration is wrong");
    require_bounded(bytes, stream.bytes());
    Buffer data(bytes + 1);
    decode(coder->text, stream, data.data(), bytes);
    return data;
}

struct Member {
    std::string key;
    std::vector<Size> shape;
};

// Tensors of one type, one after another, with `bits` per value.
struct Stream {
    const Json* coder;
    Type type;
    int bits;
    std::vector<Member> members;
    Size values;

    Size coded_bytes() const { return (values * bits + 7) / 8; }  // before coding
    Size memory_bytes() const { return values * type_bytes(type); }
};

Type parse_type(const Json* given) {
    if (given != nullptr && given->is(Json::Kind::text)) {
        try {
            return type_from_name(given->text);
        } catch (const std::invalid_argument&) {
        }
    }
    throw damaged("a stream of an unknown type");
}

int parse_bits(const Json* given, Type type) {
    const Size bits = given == nullptr ? 0 : given->integer().value_or(0);
    if (bits != 8 * type_bytes(type) && (type != Type::int8 || (bits != 2 && bits != 4)))
        throw damaged(std::string("a stream of ") + type_name(type) + " in another number of bits per value");
    return static_cast<int>(bits);
}

Stream parse_stream(const Json& entry) {
    const Json* tensors = entry.find("tensors");
    if (tensors == nullptr || !tensors->is(Json::Kind::list)) throw damaged("a stream's declaration is wrong");
    const Type type = parse_type(entry.find("dtype"));
    Stream stream{entry.find("coder"), type, parse_bits(entry.find("bits"), type), {}, 0};
    for (const Json& member : tensors->items) {
        const bool pair = member.is(Json::Kind::list) && member.items.size() == 2;
        if (!pair || !member.items[0].is(Json::Kind::text)) throw damaged("a stream's declaration is wrong");
        require_name(member.items[0].text, "tensor name");
        stream.members.push_back({member.items[0].text, parse_shape(member.items[0].text, member.items[1])});
        stream.values += element_count(stream.members.back().shape);
        if (stream.values > kElementsMax) throw damaged("a stream has more values than are read");
    }
    return stream;
}

// From byte planes, the lowest bytes first.
void join_planes(const std::byte* from, Size values, Size bytes, std::byte* to) {
    for (Size plane = 0; plane < bytes; ++plane)
        for (Size i = 0; i < values; ++i) to[i * bytes + plane] = from[plane * values + i];
}

void add_tensors(Artifact& artifact, const Stream& stream, const Tensor& stored) {
    Buffer data = decoded(stream.coder, stored, stream.coded_bytes());
    if (stream.bits != 8) {
        Buffer values(stream.memory_bytes());
        if (stream.bits < 8) {
            const auto* from = reinterpret_cast<const std::uint8_t*>(data.data());
            require_padding(from, stream.values * stream.bits);
            expand_packed(from, stream.bits, stream.values, reinterpret_cast<std::int8_t*>(values.data()));
        } else {
            join_planes(data.data(), stream.values, type_bytes(stream.type), values.data());
        }
        data = std::move(values);
    }
    const std::byte* at = data.data();
    for (const Member& member : stream.members) {
        const Tensor tensor{stream.type, member.shape, at};
        if (!artifact.tensors.emplace(member.key, tensor).second)
            throw damaged("it declares tensor " + json_text(member.key) + " twice");
        at += tensor.bytes();
    }
    artifact.owned.push_back(std::move(data));
}

Json parse_content(const Json& declared, const Tensor& coded) {
    const Json* size = declared.find("size_bytes");
    const Size limit = std::min(kJsonBytesMax, kJsonBytesFree + kJsonRatioMax * coded.bytes());
    const Size bytes = size == nullptr ? limit + 1 : size->integer().value_or(limit + 1);
    if (bytes > limit)
        throw damaged("its description takes " + (size == nullptr ? "none" : json_text(*size)) + " bytes; at most " +
                      std::to_string(limit) + " are read");
    const Buffer data = decoded(declared.find("coder"), coded, bytes);
    try {
        return parse_json({reinterpret_cast<const char*>(data.data()), static_cast<std::size_t>(bytes)});
    } catch (const JsonError& error) {
        throw damaged(std::string("its description is not JSON: ") + error.what());
    }
}

void decode_streams(Artifact& artifact, const std::map<std::string, Tensor>& stored, const Json& entries) {
    if (!entries.is(Json::Kind::list) || entries.items.size() != stored.size())
        throw damaged("its streams are not those that it declares");
    std::vector<std::pair<Stream, const Tensor*>> streams;
    Size memory_bytes = 0, coded_bytes = 0;
    for (const Json& entry : entries.items) {
        const auto found = stored.find("stream" + std::to_string(streams.size()));
        if (found == stored.end()) throw damaged("its streams are not those that it declares");
        streams.emplace_back(parse_stream(entry), &found->second);
        coded_bytes += found->second.bytes();
        memory_bytes += streams.back().first.memory_bytes();  // of 2^20 streams at most, 2^35 each
    }
    require_bounded(memory_bytes, coded_bytes);
    for (const auto& [stream, tensor] : streams) add_tensors(artifact, stream, *tensor);
}

}  // namespace

Json decode_artifact(Artifact& artifact, const Json& declared) {
    std::map<std::string, Tensor> stored;
    std::swap(stored, artifact.tensors);
    const auto coded = stored.find(kContent);
    if (!declared.is(Json::Kind::object) || coded == stored.end()) throw damaged("it has no description");
    Json content = parse_content(declared, coded->second);
    stored.erase(coded);
    const Json* layout = content.find("storage");
    if (layout == nullptr || layout->members.size() != 1 || layout->members[0].key != "streams")
        throw damaged("it does not say how its tensors are stored");
    decode_streams(artifact, stored, layout->members[0].value);
    Json* description = content.find("description");
    return description == nullptr ? Json{} : std::move(*description);
}

}  // namespace swincompress
