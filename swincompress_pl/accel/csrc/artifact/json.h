// A strict JSON parser with limits, and the canonical text of a value, over which checksums are computed.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace swincompress {

struct JsonMember;

// One value. Numbers stay as they are written, so that nothing is rounded before a checksum.
struct Json {
    enum class Kind { null, boolean, number, text, list, object };

    Kind kind = Kind::null;
    std::string text;                 // of a text: UTF-8; of a number or a boolean: as it is written
    std::vector<Json> items;          // of a list
    std::vector<JsonMember> members;  // of an object, sorted by key, each key once

    bool is(Kind other) const { return kind == other; }
    // The member called `key`; nullptr if there is none or this is not an object.
    const Json* find(std::string_view key) const;
    Json* find(std::string_view key) { return const_cast<Json*>(std::as_const(*this).find(key)); }
    // A number without fraction and exponent that fits 64 bits.
    std::optional<std::int64_t> integer() const;
    // Whether this is the text `other`.
    bool says(std::string_view other) const { return kind == Kind::text && text == other; }
};

struct JsonMember {
    std::string key;
    Json value;
};

// The message tells what is wrong and where.
struct JsonError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

constexpr int kJsonDepthMax = 64;
constexpr std::size_t kJsonValuesMax = std::size_t{1} << 20;

// Throws JsonError for anything but one JSON value in UTF-8. Repeated keys, lone surrogates, depths beyond
// kJsonDepthMax and more than kJsonValuesMax values are also errors.
Json parse_json(std::string_view text);

// Keys sorted by code point, no spaces, ASCII only, numbers as they were written. It reproduces what Python's
// json.dumps(sort_keys=True, separators=(",", ":")) wrote.
std::string json_text(const Json& value);
std::string json_text(std::string_view text);

}  // namespace swincompress
