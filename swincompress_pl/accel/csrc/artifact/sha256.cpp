#include "artifact/sha256.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace swincompress {
namespace {

// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
alignas(64) constexpr std::uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

std::uint32_t rotated(std::uint32_t x, int by) { return x >> by | x << (32 - by); }

#if defined(__x86_64__)
bool has_sha() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool sse41 = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c >> 19 & 1) != 0;
    return sse41 && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b >> 29 & 1) != 0;
}

// The instructions take the state as (a, b, e, f) and (c, d, g, h), highest word first.
__attribute__((target("sha,sse4.1"))) void blocks_by_instructions(std::uint32_t* state, const unsigned char* data,
                                                                  std::size_t blocks) {
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    const auto load = [](const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); };
    const __m128i badc = _mm_shuffle_epi32(load(state), 0xB1), hgfe = _mm_shuffle_epi32(load(state + 4), 0x1B);
    __m128i abef = _mm_alignr_epi8(badc, hgfe, 8), cdgh = _mm_blend_epi16(hgfe, badc, 0xF0);
    for (; blocks > 0; --blocks, data += 64) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i words[4];  // the last 16 words of the schedule
        for (int i = 0; i < 16; ++i) {
            __m128i& word = words[i % 4];
            if (i < 4) {
                word = _mm_shuffle_epi8(load(data + 16 * i), big_endian);
            } else {
                const __m128i last = words[(i + 3) % 4];
                const __m128i seven_back = _mm_alignr_epi8(last, words[(i + 2) % 4], 4);
                word = _mm_add_epi32(_mm_sha256msg1_epu32(word, words[(i + 1) % 4]), seven_back);
                word = _mm_sha256msg2_epu32(word, last);
            }
            __m128i input = _mm_add_epi32(word, load(kRound + 4 * i));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, input);
            input = _mm_shuffle_epi32(input, 0x0E);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, input);
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    const __m128i feba = _mm_shuffle_epi32(abef, 0x1B), dchg = _mm_shuffle_epi32(cdgh, 0xB1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(state), _mm_blend_epi16(feba, dchg, 0xF0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}
#endif

}  // namespace

void sha256_blocks_plain(std::uint32_t* state, const unsigned char* data, std::size_t blocks) {
    for (; blocks > 0; --blocks, data += 64) {
        std::uint32_t w[64];
        for (int i = 0; i < 16; ++i)
            w[i] = std::uint32_t{data[4 * i]} << 24 | std::uint32_t{data[4 * i + 1]} << 16 |
                   std::uint32_t{data[4 * i + 2]} << 8 | data[4 * i + 3];
        for (int i = 16; i < 64; ++i) {
            const std::uint32_t s0 = rotated(w[i - 15], 7) ^ rotated(w[i - 15], 18) ^ w[i - 15] >> 3;
            const std::uint32_t s1 = rotated(w[i - 2], 17) ^ rotated(w[i - 2], 19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16] + s0 + w[i - 7] + s1;
        }
        std::array<std::uint32_t, 8> copy{};
        std::copy(state, state + 8, copy.begin());
        auto [a, b, c, d, e, f, g, h] = copy;
        for (int i = 0; i < 64; ++i) {
            const std::uint32_t s1 = rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25);
            const std::uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + kRound[i] + w[i];
            const std::uint32_t s0 = rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22);
            const std::uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
            h = g, g = f, f = e, e = d + t1;
            d = c, c = b, b = a, a = t1 + t2;
        }
        const std::uint32_t added[8] = {a, b, c, d, e, f, g, h};
        for (int i = 0; i < 8; ++i) state[i] += added[i];
    }
}

void sha256_blocks(std::uint32_t* state, const unsigned char* data, std::size_t blocks) {
#if defined(__x86_64__)
    static const bool by_instructions = has_sha();
    if (by_instructions) return blocks_by_instructions(state, data, blocks);
#endif
    sha256_blocks_plain(state, data, blocks);
}

void Sha256::update(const void* data, std::size_t size) {
    const auto* from = static_cast<const unsigned char*>(data);
    size_ += size;
    if (filled_ > 0) {
        const std::size_t taken = std::min(size, block_.size() - filled_);
        std::memcpy(block_.data() + filled_, from, taken);
        filled_ += taken;
        from += taken;
        size -= taken;
        if (filled_ < block_.size()) return;
        sha256_blocks(state_.data(), block_.data(), 1);
        filled_ = 0;
    }
    sha256_blocks(state_.data(), from, size / block_.size());
    filled_ = size % block_.size();
    if (filled_ > 0) std::memcpy(block_.data(), from + size - filled_, filled_);
}

std::string Sha256::finish() {
    const std::uint64_t bits = size_ * 8;
    const std::size_t zeros = (filled_ < 56 ? 56 : 120) - filled_;
    std::array<unsigned char, 72> end{0x80};
    for (std::size_t i = 0; i < 8; ++i) end[zeros + i] = static_cast<unsigned char>(bits >> (56 - 8 * i));
    update(end.data(), zeros + 8);
    constexpr char hex[] = "0123456789abcdef";
    std::string text;
    for (const std::uint32_t word : state_)
        for (int shift = 28; shift >= 0; shift -= 4) text += hex[word >> shift & 0xF];
    return text;
}

}  // namespace swincompress
