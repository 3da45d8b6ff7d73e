// The container: a safetensors file in memory, every offset, shape and length of which is checked.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "operation.h"

namespace swincompress {

// Bytes are no artifact that this engine can run; the message tells the fault and the remedy.
struct ArtifactError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// ArtifactError for bytes that contradict themselves.
ArtifactError damaged(const std::string& what);

struct Container {
    std::string metadata;                   // the entry that was asked for
    std::map<std::string, Tensor> tensors;  // borrowed from the bytes, possibly not aligned
};

constexpr std::size_t kHeaderBytesMax = std::size_t{1} << 24;
constexpr std::size_t kNameBytesMax = 1024;  // of a tensor, an operation, a value, a class

// Throws ArtifactError for a longer name of a `what`.
void require_name(const std::string& name, const char* what);

// Throws ArtifactError; it names a file without the metadata entry `key` as foreign before it minds its tensors.
Container read_safetensors(const std::byte* bytes, std::size_t size, const std::string& key);

}  // namespace swincompress
