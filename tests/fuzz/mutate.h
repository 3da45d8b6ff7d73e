// Mutants of an artifact, each a function of one seed: lies in the description, the tensors, their storage, the
// container, or in any byte. A mutant's checksum is right unless its bytes were changed last, so that the checks behind
// it are reached.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "artifact/reader.h"

namespace swincompress::fuzz {

// Random numbers that are the same everywhere (splitmix64).
class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed) {}

    std::uint64_t next() {
        std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    std::size_t below(std::size_t count) { return static_cast<std::size_t>(next() % count); }
    bool chance(int percent) { return below(100) < static_cast<std::size_t>(percent); }
    template <typename Items>
    auto& among(Items& items) {
        return items[below(items.size())];
    }

private:
    std::uint64_t state_;
};

struct StoredTensor {
    Type type;
    std::vector<Size> shape;
    std::vector<std::byte> bytes;
};

// An artifact taken apart.
struct Parts {
    Json content;  // the metadata entry: format, version, description, storage, sha256
    std::map<std::string, StoredTensor> tensors;
};

// Throws ArtifactError for bytes whose container is damaged.
Parts take_apart(const std::vector<std::byte>& bytes);
std::vector<std::byte> put_together(Parts parts);

std::vector<std::byte> mutant(const Parts& original, std::uint64_t seed);

}  // namespace swincompress::fuzz
