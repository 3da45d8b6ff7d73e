// From packed and sparse weights to bytes, eight values at a time and without branches.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"

namespace swincompress {

// Reads `count` values of 2 to 8 bits, two's complement, one after another, the first in the highest bits. `from` has
// the (count * bits + 7) / 8 bytes that hold them.
void expand_packed(const std::uint8_t* from, int bits, Size count, std::int8_t* to);

// Writes `count` values: 0 where the bitmap has a 0 (the first value is the highest bit of a byte), the next of the
// packed values where it has a 1. `from` has the bytes of as many values as the bitmap has ones.
void expand_sparse(const std::uint8_t* bitmap, Size count, const std::uint8_t* from, Size from_bytes, int bits,
                   std::int8_t* to);

// The number of ones in `bytes` bytes.
Size count_ones(const std::uint8_t* from, Size bytes);

}  // namespace swincompress
