#include "mutate.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>

#include "artifact/storage.h"

namespace swincompress::fuzz {
namespace {

constexpr const char* kKey = "swincompress_pl";
constexpr std::array<const char*, 5> kCodes = {"I8", "U8", "I16", "I32", "I64"};  // in the order of Type

// Around every limit of the specification and of the types.
const std::vector<std::int64_t> kInteresting = {
    0,       1,       2,          3,          4,        5,        7,        8,        16,       27,
    31,      32,      38,         39,         49,       52,       53,       63,       64,       65,
    127,     128,     255,        256,        1023,     1024,     1025,     4095,     4096,     4097,
    32767,   32768,   65535,      65536,      65537,    1 << 20,  1 << 21,  1 << 22,  1 << 24,  1 << 27,
    1 << 28, 1 << 30, 2147483647, 2147483648, 1L << 32, 1L << 40, 1L << 58, 1L << 60, 1L << 62, 9223372036854775807};

Json text_value(std::string text) { return {Json::Kind::text, std::move(text), {}, {}}; }
Json number_value(std::int64_t value) { return {Json::Kind::number, std::to_string(value), {}, {}}; }

Json list_value(const std::vector<Size>& sizes) {
    Json list{Json::Kind::list, {}, {}, {}};
    for (const Size size : sizes) list.items.push_back(number_value(size));
    return list;
}

void set_member(Json& object, const std::string& key, Json value) {
    for (JsonMember& member : object.members)
        if (member.key == key) {
            member.value = std::move(value);
            return;
        }
    object.members.push_back({key, std::move(value)});
    std::sort(object.members.begin(), object.members.end(),
              [](const JsonMember& a, const JsonMember& b) { return a.key < b.key; });
}

Json* member_of(Json& object, const char* key) { return const_cast<Json*>(object.find(key)); }

void collect(Json& value, std::vector<Json*>& found) {
    found.push_back(&value);
    for (Json& item : value.items) collect(item, found);
    for (JsonMember& member : value.members) collect(member.value, found);
}

std::int64_t odd_integer(Random& random) {
    const std::int64_t value = random.among(kInteresting);
    switch (random.below(6)) {
        case 0: return -value;
        case 1: return value > 0 ? value - 1 : -1;
        case 2: return value < 9223372036854775807 ? value + 1 : value;
        default: return value;
    }
}

void mutate_number(Json& value, Random& random) {
    const auto integer = value.integer();
    if (integer && *integer > -(1L << 40) && *integer < 1L << 40 && random.chance(60)) {
        const std::array<std::int64_t, 6> near = {*integer + 1, *integer - 1, *integer * 2,
                                                  *integer / 2, -(*integer),  1 - *integer};
        value = number_value(random.among(near));
        return;
    }
    const std::array<const char*, 6> written = {"0.5", "1e3", "-0", "1e999", "99999999999999999999", "1.0"};
    value =
        random.chance(85) ? number_value(odd_integer(random)) : Json{Json::Kind::number, random.among(written), {}, {}};
}

const std::vector<const char*> kWords = {
    "linear",          "conv2d",     "layer_norm", "table",     "add",      "add_constant", "prepend",
    "gather",          "mean",       "attention",  "lif",       "max_pool", "block_sum",    "multiply",
    "spike_attention", "requantize", "int8",       "uint8",     "int16",    "int32",        "int64",
    "uint1",           "uint2",      "uint7",      "int4",      "images",   "NHWC",         "NTHWC",
    "0x1p+1",          "0x0p+0",     "inf",        "0x1p+2000", "weight",   "bias",         "",
    "\x01 \xc3\xa9",   "softmax"};

// Some text of the same document, so that references go astray, or a word of the format.
std::string other_text(const std::vector<Json*>& document, Random& random) {
    for (int tries = 0; tries < 8 && random.chance(80); ++tries) {
        const Json& other = *random.among(document);
        if (other.is(Json::Kind::text)) return other.text;
        if (!other.members.empty()) return random.among(other.members).key;
    }
    return random.among(kWords);
}

void mutate_list(Json& list, Random& random) {
    if (list.items.empty() || random.chance(10)) {
        list.items.push_back(number_value(odd_integer(random)));
        return;
    }
    const std::size_t at = random.below(list.items.size()), other = random.below(list.items.size());
    const auto place = [&](std::size_t i) { return list.items.begin() + static_cast<std::ptrdiff_t>(i); };
    switch (random.below(4)) {
        case 0: list.items.erase(place(at)); return;
        case 1: list.items.insert(place(at), Json(list.items[other])); return;
        case 2: std::swap(list.items[at], list.items[other]); return;
        default: list.items[at] = Json(list.items[other]); return;
    }
}

void mutate_object(Json& object, const std::vector<Json*>& document, Random& random) {
    if (object.members.empty() || random.chance(15)) {
        set_member(object, other_text(document, random), number_value(odd_integer(random)));
        return;
    }
    const std::size_t at = random.below(object.members.size()), other = random.below(object.members.size());
    if (random.chance(50))
        object.members.erase(object.members.begin() + static_cast<std::ptrdiff_t>(at));
    else
        std::swap(object.members[at].value, object.members[other].value);
}

void mutate_json(Json& root, Random& random) {
    std::vector<Json*> all;
    collect(root, all);
    Json& value = *random.among(all);
    if (random.chance(5)) {
        const std::array<Json, 5> strange = {Json{}, Json{Json::Kind::boolean, "true", {}, {}}, text_value("7"),
                                             Json{Json::Kind::list, {}, {}, {}}, Json{Json::Kind::object, {}, {}, {}}};
        value = strange[random.below(strange.size())];
        return;
    }
    switch (value.kind) {
        case Json::Kind::number: return mutate_number(value, random);
        case Json::Kind::text: value.text = other_text(all, random); return;
        case Json::Kind::list: return mutate_list(value, random);
        case Json::Kind::object: return mutate_object(value, all, random);
        default: value = number_value(odd_integer(random));
    }
}

// One operation's own entries, more often those that a bound hangs on.
void mutate_operation(Json& description, Random& random) {
    Json* operations = member_of(description, "operations");
    if (operations == nullptr || operations->items.empty()) return mutate_json(description, random);
    Json& operation = random.among(operations->items);
    constexpr std::array<const char*, 4> parts = {"attributes", "inputs", "tensors", "dtype"};
    Json* part = member_of(operation, parts[random.below(parts.size())]);
    if (part == nullptr || random.chance(10)) return mutate_list(*operations, random);
    if (part->is(Json::Kind::text)) {
        part->text = random.among(kWords);
    } else if (part->is(Json::Kind::list) && !part->items.empty() && random.chance(70)) {
        const Json* output = random.among(operations->items).find("output");  // any value: earlier, later, itself
        random.among(part->items) = output == nullptr ? text_value("images") : *output;
    } else {
        mutate_json(*part, random);
    }
}

// An entry of a named output, more often the value that it gives and its shape.
void mutate_output(Json& description, Random& random) {
    Json* outputs = member_of(description, "outputs");
    const Json* operations = description.find("operations");
    if (outputs == nullptr || outputs->items.empty() || random.chance(20)) return mutate_json(description, random);
    Json& output = random.among(outputs->items);
    constexpr std::array<const char*, 4> parts = {"value", "shape", "name", "scale"};
    Json* part = member_of(output, parts[random.below(parts.size())]);
    if (part == nullptr || random.chance(10)) return mutate_list(*outputs, random);
    if (part->is(Json::Kind::text) && operations != nullptr && !operations->items.empty() && random.chance(80)) {
        const Json* any = random.among(operations->items).find("output");
        *part = any == nullptr ? text_value("images") : *any;
    } else {
        mutate_json(*part, random);
    }
}

void fill(StoredTensor& tensor, std::size_t first, std::size_t last, std::int64_t value) {
    const auto size = static_cast<std::size_t>(type_bytes(tensor.type));
    for (std::size_t i = first; i < last; ++i) std::memcpy(tensor.bytes.data() + i * size, &value, size);
}

void resize(StoredTensor& tensor) {
    std::uint64_t bytes = static_cast<std::uint64_t>(type_bytes(tensor.type));
    for (const Size size : tensor.shape)
        bytes = std::min<std::uint64_t>(bytes * static_cast<std::uint64_t>(size), 1 << 20);
    tensor.bytes.resize(bytes);
}

void mutate_shape(StoredTensor& tensor, Random& random) {
    if (tensor.shape.empty()) return;
    Size& size = random.among(tensor.shape);
    switch (random.below(5)) {
        case 0: size += 1; break;
        case 1: size -= 1; break;
        case 2: size = static_cast<Size>(random.below(70)); break;
        case 3: std::swap(size, random.among(tensor.shape)); break;
        default: tensor.shape.push_back(1);
    }
    if (random.chance(90)) resize(tensor);
}

void mutate_tensor(Parts& parts, Random& random) {
    if (parts.tensors.empty()) return;
    auto at = parts.tensors.begin();
    std::advance(at, static_cast<std::ptrdiff_t>(random.below(parts.tensors.size())));
    StoredTensor& tensor = at->second;
    const std::size_t count = tensor.bytes.size() / static_cast<std::size_t>(type_bytes(tensor.type));
    if (random.chance(20) || count == 0) return mutate_shape(tensor, random);
    if (random.chance(5)) {
        tensor.type = static_cast<Type>(random.below(5));
        return resize(tensor);
    }
    if (random.chance(5)) {
        parts.tensors.erase(at);
        return;
    }
    const std::size_t first = random.chance(40) ? 0 : random.below(count);
    const std::size_t last = first == 0 ? count : std::min(count, first + 1 + random.below(4));
    fill(tensor, first, last, odd_integer(random));
}

// The checksum of what the reader will see, where it gets that far.
void seal(Parts& parts) {
    Artifact artifact;
    for (const auto& [key, tensor] : parts.tensors) {
        Buffer& copy = artifact.owned.emplace_back(static_cast<Size>(tensor.bytes.size()));
        std::copy(tensor.bytes.begin(), tensor.bytes.end(), copy.data());
        artifact.tensors[key] = {tensor.type, tensor.shape, copy.data()};
    }
    const Json *description = parts.content.find("description"), *layout = parts.content.find("storage");
    try {
        for (const auto& [key, tensor] : parts.tensors)
            if (artifact.tensors[key].bytes() != static_cast<Size>(tensor.bytes.size())) return;
        if (layout != nullptr && layout->find("packed") != nullptr) unpack_tensors(artifact, *layout->find("packed"));
        if (layout != nullptr && layout->find("sparse") != nullptr) restore_sparse(artifact, *layout->find("sparse"));
        if (layout != nullptr && layout->find("folded") != nullptr) unfold_maps(artifact, *layout->find("folded"));
        if (description != nullptr)
            set_member(parts.content, "sha256", text_value(artifact_checksum(*description, artifact.tensors)));
    } catch (const std::invalid_argument&) {  // the reader will say the same
    }
}

Json header_of(const Parts& parts) {
    Json header{Json::Kind::object, {}, {}, {}}, metadata = header;
    set_member(metadata, kKey, text_value(json_text(parts.content)));
    set_member(header, "__metadata__", metadata);
    Size end = 0;
    for (const auto& [key, tensor] : parts.tensors) {
        const Size first = end;
        end += static_cast<Size>(tensor.bytes.size());
        Json entry{Json::Kind::object, {}, {}, {}};
        set_member(entry, "dtype", text_value(kCodes[static_cast<std::size_t>(tensor.type)]));
        set_member(entry, "shape", list_value(tensor.shape));
        set_member(entry, "data_offsets", list_value({first, end}));
        set_member(header, key, entry);
    }
    return header;
}

std::vector<std::byte> file_of(const Json& header, const Parts& parts) {
    const std::string text = json_text(header);
    std::vector<std::byte> bytes(8 + text.size());
    const std::uint64_t size = text.size();
    std::memcpy(bytes.data(), &size, 8);
    std::memcpy(bytes.data() + 8, text.data(), text.size());
    for (const auto& [key, tensor] : parts.tensors) bytes.insert(bytes.end(), tensor.bytes.begin(), tensor.bytes.end());
    return bytes;
}

void mutate_bytes(std::vector<std::byte>& bytes, Random& random) {
    for (std::size_t changes = 1 + random.below(4); changes > 0 && !bytes.empty(); --changes) {
        // the header is small, and all that is parsed
        const std::size_t reach = random.chance(30) ? std::min<std::size_t>(bytes.size(), 16) : bytes.size();
        const std::size_t at = random.below(reach);
        const auto place = bytes.begin() + static_cast<std::ptrdiff_t>(at);
        switch (random.below(6)) {
            case 0: bytes.resize(at); break;
            case 1: bytes.insert(place, static_cast<std::byte>(random.next())); break;
            case 2: bytes.erase(place); break;
            case 3: bytes[at] = static_cast<std::byte>(random.next()); break;
            case 4: bytes.insert(bytes.end(), bytes.begin(), place); break;
            default: bytes[at] ^= std::byte{1} << random.below(8);
        }
    }
}

void mutate_parts(Parts& parts, Random& random) {
    Json* description = member_of(parts.content, "description");
    Json* layout = member_of(parts.content, "storage");
    const std::size_t what = random.below(100);
    if (what < 40 && description != nullptr)
        mutate_operation(*description, random);
    else if (what < 50 && description != nullptr)
        mutate_output(*description, random);
    else if (what < 60 && layout != nullptr)
        mutate_json(*layout, random);
    else if (what < 62)
        mutate_json(parts.content, random);
    else
        mutate_tensor(parts, random);
}

}  // namespace

Parts take_apart(const std::vector<std::byte>& bytes) {
    const Container container = read_safetensors(bytes.data(), bytes.size(), kKey);
    Parts parts{parse_json(container.metadata), {}};
    for (const auto& [key, tensor] : container.tensors) {
        const auto* from = static_cast<const std::byte*>(tensor.data);
        parts.tensors[key] = {tensor.type, tensor.shape, {from, from + tensor.bytes()}};
    }
    return parts;
}

std::vector<std::byte> put_together(Parts parts) {
    seal(parts);
    return file_of(header_of(parts), parts);
}

std::vector<std::byte> mutant(const Parts& original, std::uint64_t seed) {
    Random random(seed);
    Parts parts = original;
    const bool only_bytes = random.chance(10);
    for (std::size_t changes = only_bytes ? 0 : 1 + random.below(3); changes > 0; --changes)
        mutate_parts(parts, random);
    seal(parts);
    Json header = header_of(parts);
    if (!only_bytes && random.chance(5)) mutate_json(header, random);
    std::vector<std::byte> bytes = file_of(header, parts);
    if (only_bytes || random.chance(3)) mutate_bytes(bytes, random);
    return bytes;
}

}  // namespace swincompress::fuzz
