#include "artifact/storage.h"

#include <algorithm>
#include <cstring>

#include "artifact/expand.h"

namespace swincompress {
namespace {

constexpr std::size_t kAxesMax = 8;
// Maps may unfold to this many bytes, or to this many times the artifact's own size if that is more.
constexpr Size kUnfoldedBytesFree = Size{1} << 24, kUnfoldedRatioMax = 128;

Tensor& tensor_of(Artifact& artifact, const std::string& key, const char* what) {
    const auto found = artifact.tensors.find(key);
    if (found == artifact.tensors.end())
        throw damaged(std::string("entry of ") + what + " " + json_text(key) + " is wrong");
    return found->second;
}

struct Narrow {
    Tensor& tensor;  // as it is stored
    int bits;
    std::vector<Size> shape;
    Size count;
};

// `entry` is [bits, shape]; the number of bits is at most `bits_max`.
Narrow parse_narrow(Artifact& artifact, const std::string& key, const Json& entry, Size bits_max, const char* what) {
    Tensor& tensor = tensor_of(artifact, key, what);
    const bool pair = entry.is(Json::Kind::list) && entry.items.size() == 2;
    const Size bits = pair ? entry.items[0].integer().value_or(0) : 0;
    if (bits < 2 || bits > bits_max)
        throw damaged(std::string("entry of ") + what + " " + json_text(key) + " is wrong");
    std::vector<Size> shape = parse_shape(key, entry.items[1]);
    const Size count = element_count(shape);
    return {tensor, static_cast<int>(bits), std::move(shape), count};
}

Size stored_bytes(const Tensor& tensor) {
    return tensor.type == Type::uint8 && tensor.shape.size() == 1 ? tensor.shape[0] : -1;
}

Size packed_bytes(Size count, int bits) { return (count * bits + 7) / 8; }

// Replaces the stored tensor by one of int8, which `expand` fills.
template <typename Expand>
void replace(Artifact& artifact, Narrow& narrow, const Expand& expand) {
    Buffer& values = artifact.owned.emplace_back(narrow.count);
    expand(reinterpret_cast<std::int8_t*>(values.data()));
    narrow.tensor = {Type::int8, std::move(narrow.shape), values.data()};
}

void unpack_one(Artifact& artifact, const std::string& key, const Json& entry) {
    Narrow narrow = parse_narrow(artifact, key, entry, 7, "packed tensor");
    if (stored_bytes(narrow.tensor) != packed_bytes(narrow.count, narrow.bits))
        throw damaged("the bytes of " + json_text(key) + " do not hold " + std::to_string(narrow.count) +
                      " values of " + std::to_string(narrow.bits) + " bits");
    const auto* from = static_cast<const std::uint8_t*>(narrow.tensor.data);
    require_padding(from, narrow.count * narrow.bits);
    replace(artifact, narrow, [&](std::int8_t* to) { expand_packed(from, narrow.bits, narrow.count, to); });
}

void restore_one(Artifact& artifact, const std::string& key, const Json& entry) {
    Narrow narrow = parse_narrow(artifact, key, entry, 8, "sparse tensor");
    const Size bytes = stored_bytes(narrow.tensor), bitmap_bytes = packed_bytes(narrow.count, 1);
    if (bytes < bitmap_bytes)
        throw damaged("the bytes of " + json_text(key) + " do not hold a bitmap of " + std::to_string(narrow.count) +
                      " values");
    const auto* bitmap = static_cast<const std::uint8_t*>(narrow.tensor.data);
    const auto* from = bitmap + bitmap_bytes;
    require_padding(bitmap, narrow.count);
    const Size ones = count_ones(bitmap, bitmap_bytes), from_bytes = bytes - bitmap_bytes;
    if (from_bytes != packed_bytes(ones, narrow.bits))
        throw damaged("the bytes of " + json_text(key) + " do not hold the " + std::to_string(ones) + " values of " +
                      std::to_string(narrow.bits) + " bits that its bitmap has");
    require_padding(from, ones * narrow.bits);
    replace(artifact, narrow,
            [&](std::int8_t* to) { expand_sparse(bitmap, narrow.count, from, from_bytes, narrow.bits, to); });
}

// Numbers of slices, each below `size`.
std::vector<Size> parse_slices(const std::string& key, const Json& given, Size size) {
    std::vector<Size> slices;
    for (const Json& item : given.items) slices.push_back(item.integer().value_or(-1));
    const bool inside = std::all_of(slices.begin(), slices.end(), [&](Size at) { return at >= 0 && at < size; });
    if (!given.is(Json::Kind::list) || slices.empty() || !inside)
        throw damaged("folded map " + json_text(key) + " has rows or columns that it lacks");
    return slices;
}

struct Unfolded {
    Tensor& tensor;
    std::vector<Size> rows, columns;

    // (which, columns, channels) of the stored map
    Size cell_bytes() const { return tensor.shape[2] * type_bytes(tensor.type); }
    Size cells() const { return static_cast<Size>(rows.size()) * static_cast<Size>(columns.size()); }
};

Unfolded parse_unfolded(Artifact& artifact, const std::string& key, const Json& entry) {
    Tensor& tensor = tensor_of(artifact, key, "folded map");
    if (tensor.shape.size() != 3 || !entry.is(Json::Kind::list) || entry.items.size() != 2)
        throw damaged("entry of folded map " + json_text(key) + " is wrong");
    return {tensor, parse_slices(key, entry.items[0], tensor.shape[0]),
            parse_slices(key, entry.items[1], tensor.shape[1])};
}

void unfold(Artifact& artifact, const Unfolded& map) {
    const Size cell = map.cell_bytes();
    const auto* from = static_cast<const std::byte*>(map.tensor.data);
    Buffer& values = artifact.owned.emplace_back(map.cells() * cell);
    std::byte* to = values.data();
    for (const Size row : map.rows)
        for (const Size column : map.columns) {
            std::memcpy(to, from + (row * map.tensor.shape[1] + column) * cell, static_cast<std::size_t>(cell));
            to += cell;
        }
    const Size height = static_cast<Size>(map.rows.size()), width = static_cast<Size>(map.columns.size());
    map.tensor = {map.tensor.type, {height, width, map.tensor.shape[2]}, values.data()};
}

}  // namespace

std::vector<Size> parse_shape(const std::string& key, const Json& sizes) {
    std::vector<Size> shape;
    const bool listed = sizes.is(Json::Kind::list) && !sizes.items.empty() && sizes.items.size() <= kAxesMax;
    for (const Json& size : sizes.items) shape.push_back(listed ? size.integer().value_or(0) : 0);
    try {
        if (listed && element_count(shape) > 0) return shape;
    } catch (const std::invalid_argument&) {
    }
    throw damaged("tensor " + json_text(key) + " has shape " + json_text(sizes));
}

void require_padding(const std::uint8_t* from, Size bits) {
    if (bits % 8 != 0 && (from[bits / 8] & 0xFF >> bits % 8) != 0) throw damaged("padding bits are set");
}

void unpack_tensors(Artifact& artifact, const Json& packed) {
    if (!packed.is(Json::Kind::object)) throw damaged("its list of packed tensors is not a mapping");
    for (const JsonMember& member : packed.members) unpack_one(artifact, member.key, member.value);
}

void restore_sparse(Artifact& artifact, const Json& sparse) {
    if (!sparse.is(Json::Kind::object)) throw damaged("its list of sparse tensors is not a mapping");
    for (const JsonMember& member : sparse.members) restore_one(artifact, member.key, member.value);
}

void unfold_maps(Artifact& artifact, const Json& folded) {
    if (!folded.is(Json::Kind::object)) throw damaged("its list of folded maps is not a mapping");
    Size stored_bytes = 0, unfolded_bytes = 0;
    for (const auto& [key, tensor] : artifact.tensors) stored_bytes += tensor.bytes();
    const Size limit = kUnfoldedBytesFree + kUnfoldedRatioMax * stored_bytes;
    std::vector<Unfolded> maps;
    for (const JsonMember& member : folded.members) {
        maps.push_back(parse_unfolded(artifact, member.key, member.value));
        const Size left = std::min(limit - unfolded_bytes, kElementsMax);
        if (maps.back().cells() > left / maps.back().cell_bytes())
            throw damaged("its folded maps unfold to more than " + std::to_string(limit) + " bytes");
        unfolded_bytes += maps.back().cells() * maps.back().cell_bytes();
    }
    for (const Unfolded& map : maps) unfold(artifact, map);
}

}  // namespace swincompress
