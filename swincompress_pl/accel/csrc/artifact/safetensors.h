// The container: a safetensors file in memory, with every offset, shape and length checked.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "program/operation.h"

namespace swincompress {

// The bytes are not an artifact that this engine can run; the message names the fault and the remedy.
struct ArtifactError : std::invalid_argument {
    using std::invalid_argument::invalid_argument;
};

// An ArtifactError for bytes that contradict themselves.
ArtifactError damaged(const std::string& what);

struct Container {
    std::string metadata;                   // the requested entry
    std::map<std::string, Tensor> tensors;  // borrowed from the bytes, possibly not aligned
};

constexpr std::size_t kHeaderBytesMax = std::size_t{1} << 24;
constexpr std::size_t kNameBytesMax = 1024;  // of the name of a tensor, an operation, a value or a class

// Throws ArtifactError for a longer name of a `what`.
void require_name(const std::string& name, const char* what);

// Throws ArtifactError. A file without the metadata entry `key` is refused as foreign before its tensors are checked.
// `admit` also sees the entry before that: the tensors of another version may be of another kind.
Container read_safetensors(
    const std::byte* bytes, std::size_t size, const std::string& key,
    const std::function<void(const std::string&)>& admit = [](const std::string&) {});

}  // namespace swincompress
