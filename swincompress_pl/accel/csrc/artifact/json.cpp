#include "artifact/json.h"

#include <algorithm>
#include <limits>

namespace swincompress {
namespace {

bool is_digit(int c) { return c >= '0' && c <= '9'; }

// Where the characters from `at` on end that JSON has as they are: printable ASCII but quote and backslash.
std::size_t plain_end(std::string_view text, std::size_t at) {
    while (at < text.size() && text[at] >= 0x20 && text[at] < 0x7F && text[at] != '"' && text[at] != '\\') ++at;
    return at;
}

void append_utf8(std::uint32_t point, std::string& to) {
    const auto tail = [&](int shift) { to += static_cast<char>(0x80 | ((point >> shift) & 0x3F)); };
    if (point < 0x80) {
        to += static_cast<char>(point);
    } else if (point < 0x800) {
        to += static_cast<char>(0xC0 | (point >> 6));
        tail(0);
    } else if (point < 0x10000) {
        to += static_cast<char>(0xE0 | (point >> 12));
        tail(6);
        tail(0);
    } else {
        to += static_cast<char>(0xF0 | (point >> 18));
        tail(12);
        tail(6);
        tail(0);
    }
}

// The code point that starts at text[at], which moves `at` behind it; -1 for what is not UTF-8.
std::int64_t next_code_point(std::string_view text, std::size_t& at) {
    const auto byte = [&](std::size_t i) { return static_cast<std::uint32_t>(static_cast<unsigned char>(text[i])); };
    const std::uint32_t first = byte(at);
    const std::size_t size = first < 0x80 ? 1 : first < 0xC2 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    if (size == 0 || first > 0xF4 || text.size() - at < size) return -1;
    if (size == 1) return static_cast<std::int64_t>(text[at++]);
    std::uint32_t point = first & (0x7Fu >> size);
    for (std::size_t i = 1; i < size; ++i) {
        if ((byte(at + i) & 0xC0) != 0x80) return -1;
        point = point << 6 | (byte(at + i) & 0x3F);
    }
    const bool overlong = (size == 3 && point < 0x800) || (size == 4 && point < 0x10000);
    if (overlong || point > 0x10FFFF || (point >= 0xD800 && point < 0xE000)) return -1;
    at += size;
    return point;
}

class Parser {
public:
    explicit Parser(std::string_view text) : text_(text) {}

    Json whole() {
        Json value = parse(0);
        skip_spaces();
        if (at_ != text_.size()) fail("more follows the value");
        return value;
    }

private:
    [[noreturn]] void fail(const std::string& what) const { throw JsonError(what + " at byte " + std::to_string(at_)); }

    int peek() const { return at_ < text_.size() ? static_cast<unsigned char>(text_[at_]) : -1; }

    void skip_spaces() {
        while (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r') ++at_;
    }

    void expect(char c) {
        if (peek() != c) fail(std::string("no '") + c + "'");
        ++at_;
    }

    bool take(std::string_view word) {
        if (text_.substr(at_, word.size()) != word) return false;
        at_ += word.size();
        return true;
    }

    Json parse(int depth) {
        if (depth > kJsonDepthMax) fail("nested deeper than " + std::to_string(kJsonDepthMax));
        if (++values_ > kJsonValuesMax) fail("more than " + std::to_string(kJsonValuesMax) + " values");
        skip_spaces();
        Json value;
        if (peek() == '{') {
            parse_object(value, depth);
        } else if (peek() == '[') {
            parse_list(value, depth);
        } else if (peek() == '"') {
            value.kind = Json::Kind::text;
            value.text = parse_text();
        } else if (take("null")) {
            value.kind = Json::Kind::null;
        } else if (take("true") || take("false")) {
            value.kind = Json::Kind::boolean;
            value.text = text_[at_ - 2] == 'u' ? "true" : "false";
        } else {
            value.kind = Json::Kind::number;
            value.text = parse_number();
        }
        return value;
    }

    // Calls `item` for each item between brackets.
    template <typename Item>
    void parse_items(char close, const Item& item) {
        ++at_;
        skip_spaces();
        if (peek() == close) {
            ++at_;
            return;
        }
        for (;;) {
            item();
            skip_spaces();
            if (peek() != ',') return expect(close);
            ++at_;
        }
    }

    void parse_list(Json& value, int depth) {
        value.kind = Json::Kind::list;
        parse_items(']', [&] { value.items.push_back(parse(depth + 1)); });
    }

    void parse_object(Json& value, int depth) {
        value.kind = Json::Kind::object;
        parse_items('}', [&] {
            skip_spaces();
            if (peek() != '"') fail("no key");
            std::string key = parse_text();
            skip_spaces();
            expect(':');
            value.members.push_back({std::move(key), parse(depth + 1)});
        });
        const auto by_key = [](const JsonMember& a, const JsonMember& b) { return a.key < b.key; };
        std::sort(value.members.begin(), value.members.end(), by_key);
        const auto same_key = [](const JsonMember& a, const JsonMember& b) { return a.key == b.key; };
        const auto twice = std::adjacent_find(value.members.begin(), value.members.end(), same_key);
        if (twice != value.members.end()) fail("key " + json_text(twice->key) + " is given twice");
    }

    std::string parse_text() {
        std::string text;
        ++at_;
        for (;;) {
            const std::size_t end = plain_end(text_, at_);
            text.append(text_, at_, end - at_);
            at_ = end;
            if (peek() == '"') break;
            if (peek() < 0x20) fail(peek() < 0 ? "text without an end" : "control character in a text");
            if (peek() == '\\') {
                append_utf8(parse_escape(), text);
            } else {
                const std::size_t first = at_;
                if (next_code_point(text_, at_) < 0) fail("bytes that are not UTF-8");
                text.append(text_.substr(first, at_ - first));
            }
        }
        ++at_;
        return text;
    }

    std::uint32_t parse_escape() {
        ++at_;
        const int c = peek();
        ++at_;
        constexpr std::string_view names = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
        const std::size_t known = c < 0 ? std::string_view::npos : names.find(static_cast<char>(c));
        if (known != std::string_view::npos) return static_cast<unsigned char>(meanings[known]);
        if (c != 'u') fail("unknown escape");
        const std::uint32_t high = parse_hex();
        if (high < 0xD800 || high >= 0xE000) return high;
        if (high >= 0xDC00 || !take("\\u")) fail("half of a surrogate pair");
        const std::uint32_t low = parse_hex();
        if (low < 0xDC00 || low >= 0xE000) fail("half of a surrogate pair");
        return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00);
    }

    std::uint32_t parse_hex() {
        std::uint32_t value = 0;
        for (int i = 0; i < 4; ++i, ++at_) {
            const int c = peek(), lower = c | 0x20;
            if (!is_digit(c) && (lower < 'a' || lower > 'f')) fail("no hexadecimal digit");
            value = value << 4 | static_cast<std::uint32_t>(is_digit(c) ? c - '0' : lower - 'a' + 10);
        }
        return value;
    }

    void digits() {
        if (!is_digit(peek())) fail("no value");
        while (is_digit(peek())) ++at_;
    }

    std::string parse_number() {
        const std::size_t first = at_;
        if (peek() == '-') ++at_;
        if (peek() == '0')
            ++at_;
        else
            digits();
        if (peek() == '.') {
            ++at_;
            digits();
        }
        if (peek() == 'e' || peek() == 'E') {
            ++at_;
            if (peek() == '+' || peek() == '-') ++at_;
            digits();
        }
        return std::string(text_.substr(first, at_ - first));
    }

    std::string_view text_;
    std::size_t at_ = 0, values_ = 0;
};

void append_escaped(std::uint32_t unit, std::string& to) {
    constexpr char hex[] = "0123456789abcdef";
    to += "\\u";
    for (int shift = 12; shift >= 0; shift -= 4) to += hex[(unit >> shift) & 0xF];
}

void append_text(std::string_view text, std::string& to) {
    constexpr std::string_view short_names = "\"\\bfnrt", short_meanings = "\"\\\b\f\n\r\t";
    to += '"';
    for (std::size_t at = 0; at < text.size();) {
        const std::size_t end = plain_end(text, at);
        to.append(text, at, end - at);
        if ((at = end) == text.size()) break;
        const std::int64_t point = next_code_point(text, at);
        if (point < 0) throw JsonError("text that is not UTF-8");
        const std::size_t known = point < 0x80 ? short_meanings.find(static_cast<char>(point)) : std::string_view::npos;
        if (known != std::string_view::npos) {
            to += '\\';
            to += short_names[known];
        } else if (point < 0x10000) {
            append_escaped(static_cast<std::uint32_t>(point), to);
        } else {
            append_escaped(static_cast<std::uint32_t>(0xD800 + ((point - 0x10000) >> 10)), to);
            append_escaped(static_cast<std::uint32_t>(0xDC00 + ((point - 0x10000) & 0x3FF)), to);
        }
    }
    to += '"';
}

void append_value(const Json& value, std::string& to) {
    const char* separator = "";
    switch (value.kind) {
        case Json::Kind::null: to += "null"; return;
        case Json::Kind::boolean:
        case Json::Kind::number: to += value.text; return;
        case Json::Kind::text: append_text(value.text, to); return;
        case Json::Kind::list:
            to += '[';
            for (const Json& item : value.items) {
                to += separator;
                append_value(item, to);
                separator = ",";
            }
            to += ']';
            return;
        case Json::Kind::object:
            to += '{';
            for (const JsonMember& member : value.members) {
                to += separator;
                append_text(member.key, to);
                to += ':';
                append_value(member.value, to);
                separator = ",";
            }
            to += '}';
            return;
    }
}

}  // namespace

const Json* Json::find(std::string_view key) const {
    const auto before = [](const JsonMember& member, std::string_view wanted) { return member.key < wanted; };
    const auto found = std::lower_bound(members.begin(), members.end(), key, before);
    return found != members.end() && found->key == key ? &found->value : nullptr;
}

std::optional<std::int64_t> Json::integer() const {
    if (kind != Kind::number) return std::nullopt;
    const bool negative = text[0] == '-';
    std::int64_t value = 0;
    for (std::size_t i = negative ? 1 : 0; i < text.size(); ++i) {
        if (!is_digit(text[i])) return std::nullopt;
        const int digit = text[i] - '0';
        if (value > (std::numeric_limits<std::int64_t>::max() - digit) / 10) return std::nullopt;
        value = 10 * value + digit;
    }
    return negative ? -value : value;
}

Json parse_json(std::string_view text) { return Parser(text).whole(); }

std::string json_text(const Json& value) {
    std::string text;
    append_value(value, text);
    return text;
}

std::string json_text(std::string_view text) {
    std::string quoted;
    append_text(text, quoted);
    return quoted;
}

}  // namespace swincompress
