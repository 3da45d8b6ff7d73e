#include "artifact/expand.h"

#include <array>
#include <cstring>
#include <type_traits>

namespace swincompress {
namespace {

// A word holds eight values, the first in its highest byte.
std::uint64_t swapped(std::uint64_t word) {
    return __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? __builtin_bswap64(word) : word;
}

std::uint64_t load_big(const std::uint8_t* from) {
    std::uint64_t word = 0;
    std::memcpy(&word, from, 8);
    return swapped(word);
}

void store_big(std::uint64_t word, std::int8_t* to) {
    word = swapped(word);
    std::memcpy(to, &word, 8);
}

void store_first(std::uint64_t word, Size values, std::int8_t* to) {
    std::int8_t all[8];
    store_big(word, all);
    std::memcpy(to, all, static_cast<std::size_t>(values));
}

constexpr std::uint64_t lane(int number) { return std::uint64_t{0xFF} << (56 - 8 * number); }

// How the first values of a word move to the lanes of the ones in a byte: some by four lanes, then some by two, then
// some by one. A mask has the lanes that they arrive at; no value moves onto one that stays.
struct Spread {
    std::uint64_t by_four = 0, by_two = 0, by_one = 0, kept = 0;
    std::size_t ones = 0;
};

constexpr std::array<Spread, 256> make_spreads() {
    std::array<Spread, 256> spreads{};
    for (int byte = 0; byte < 256; ++byte) {
        Spread& spread = spreads[static_cast<std::size_t>(byte)];
        for (int to = 0; to < 8; ++to) {
            if ((byte >> (7 - to) & 1) == 0) continue;
            const int from = static_cast<int>(spread.ones++), by = to - from;
            if ((by & 4) != 0) spread.by_four |= lane(from + 4);
            if ((by & 2) != 0) spread.by_two |= lane(from + (by & 4) + 2);
            if ((by & 1) != 0) spread.by_one |= lane(to);
            spread.kept |= lane(to);
        }
    }
    return spreads;
}

constexpr std::array<Spread, 256> kSpreads = make_spreads();

std::uint64_t spread_word(std::uint64_t word, const Spread& spread) {
    word ^= (word ^ word >> 32) & spread.by_four;
    word ^= (word ^ word >> 16) & spread.by_two;
    word ^= (word ^ word >> 8) & spread.by_one;
    return word & spread.kept;
}

// The packed values from some bit on.
template <int kBits>
class PackedValues {
public:
    PackedValues(const std::uint8_t* from, Size bytes) : from_(from), bytes_(static_cast<std::size_t>(bytes)) {}

    // Eight values from bit `at` on, each in a byte; beyond the last one their bits are 0.
    std::uint64_t word(std::size_t at) const {
        const std::size_t byte = at / 8;
        std::uint64_t window = 0;
        if (bytes_ - byte >= 8) {
            window = load_big(from_ + byte);
        } else {
            std::uint8_t last[8] = {};
            std::memcpy(last, from_ + byte, bytes_ - byte);
            window = load_big(last);
        }
        if constexpr (kBits == 8) return window;
        return to_bytes(window << (at % 8) >> (64 - 8 * kBits));
    }

private:
    // The low `bits` bits of each field of `width` bits.
    static constexpr std::uint64_t low(int bits, int width) {
        std::uint64_t mask = 0;
        for (int at = 0; at < 64; at += width) mask |= ((std::uint64_t{1} << bits) - 1) << at;
        return mask;
    }

    // Halves each field of 2 * `bits` bits: the upper half moves to the upper half of the `width` that it has.
    static constexpr std::uint64_t halve(std::uint64_t word, int bits, int width) {
        const std::uint64_t lower = low(bits, width);
        return (word & lower) | (word & ~lower) << (width / 2 - bits);
    }

    // The eight fields in the low bits of a word, as signed bytes.
    static std::uint64_t to_bytes(std::uint64_t word) {
        word = halve(halve(halve(word, 4 * kBits, 64), 2 * kBits, 32), kBits, 16);
        constexpr std::uint64_t sign = low(1, 8) << (kBits - 1), top = low(1, 8) << 7;
        // flipping the sign adds 2^(kBits - 1); the top bits keep a byte's borrow from its neighbor
        return (((word ^ sign) | top) - sign) ^ top;
    }

    const std::uint8_t* from_;
    std::size_t bytes_;
};

template <int kBits>
void expand_dense(const std::uint8_t* from, Size count, std::int8_t* to) {
    const PackedValues<kBits> values(from, (count * kBits + 7) / 8);
    std::size_t at = 0;
    Size i = 0;
    for (; i + 8 <= count; i += 8, at += 8 * kBits) store_big(values.word(at), to + i);
    store_first(values.word(at), count - i, to + i);
}

template <int kBits>
void expand_nonzero(const std::uint8_t* bitmap, Size count, const std::uint8_t* from, Size from_bytes,
                    std::int8_t* to) {
    const PackedValues<kBits> values(from, from_bytes);
    std::size_t at = 0;
    Size i = 0;
    for (; i + 8 <= count; i += 8) {
        const Spread& spread = kSpreads[*bitmap++];
        store_big(spread_word(values.word(at), spread), to + i);
        at += kBits * spread.ones;
    }
    if (i < count) store_first(spread_word(values.word(at), kSpreads[*bitmap]), count - i, to + i);
}

// Calls `expand` with the number of bits as a constant.
template <typename Expand>
void with_bits(int bits, const Expand& expand) {
    switch (bits) {
        case 2: return expand(std::integral_constant<int, 2>{});
        case 3: return expand(std::integral_constant<int, 3>{});
        case 4: return expand(std::integral_constant<int, 4>{});
        case 5: return expand(std::integral_constant<int, 5>{});
        case 6: return expand(std::integral_constant<int, 6>{});
        case 7: return expand(std::integral_constant<int, 7>{});
        default: return expand(std::integral_constant<int, 8>{});
    }
}

}  // namespace

void expand_packed(const std::uint8_t* from, int bits, Size count, std::int8_t* to) {
    with_bits(bits, [&](auto width) { expand_dense<width>(from, count, to); });
}

void expand_sparse(const std::uint8_t* bitmap, Size count, const std::uint8_t* from, Size from_bytes, int bits,
                   std::int8_t* to) {
    with_bits(bits, [&](auto width) { expand_nonzero<width>(bitmap, count, from, from_bytes, to); });
}

Size count_ones(const std::uint8_t* from, Size bytes) {
    Size ones = 0;
    for (Size i = 0; i < bytes; ++i) ones += static_cast<Size>(kSpreads[from[i]].ones);
    return ones;
}

}  // namespace swincompress
