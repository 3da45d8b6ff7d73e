// SHA-256 (FIPS 180-4), with the CPU's own instructions if it has them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace swincompress {

class Sha256 {
public:
    void update(const void* data, std::size_t size);
    void update(const std::string& text) { update(text.data(), text.size()); }

    // 64 hexadecimal digits; nothing may be added afterwards.
    std::string finish();

private:
    std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                           0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<unsigned char, 64> block_{};
    std::size_t filled_ = 0;
    std::uint64_t size_ = 0;
};

// Adds `blocks` of 64 bytes to a state; the function in plain C++ is there for comparison.
void sha256_blocks(std::uint32_t* state, const unsigned char* data, std::size_t blocks);
void sha256_blocks_plain(std::uint32_t* state, const unsigned char* data, std::size_t blocks);

}  // namespace swincompress
