// Memory with the alignment of a cache line and of the widest register.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "kernels/kernels.h"

namespace swincompress {

constexpr Size kAlignment = 64;

constexpr Size aligned(Size bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

class Buffer {
public:
    explicit Buffer(Size bytes = 0) : data_(allocate(bytes)), bytes_(bytes) {}

    std::byte* data() const { return data_.get(); }
    Size bytes() const { return bytes_; }

private:
    struct Free {
        void operator()(std::byte* data) const { std::free(data); }
    };

    static std::byte* allocate(Size bytes) {
        void* data = std::aligned_alloc(kAlignment, static_cast<std::size_t>(aligned(bytes < 1 ? 1 : bytes)));
        if (data == nullptr) throw std::bad_alloc();
        return static_cast<std::byte*>(data);
    }

    std::unique_ptr<std::byte[], Free> data_;
    Size bytes_;
};

}  // namespace swincompress
