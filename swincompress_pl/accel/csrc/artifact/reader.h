// The only reader of artifacts: it turns bytes into a description and tensors with the right checksum, and these into a
// program. Python and C++ both load through it. It takes memory in proportion to the file and trusts nothing in it.
#pragma once

#include <memory>
#include <optional>

#include "artifact/json.h"
#include "artifact/safetensors.h"
#include "kernels/buffer.h"

namespace swincompress {

// The bytes are an entropy-coded artifact, and this build lacks the coders. Python has them, and decodes it then.
struct CodedError : ArtifactError {
    using ArtifactError::ArtifactError;
};

// The content of an artifact. Tensors are as in memory: unpacked, unfolded and aligned; some are borrowed from the
// bytes.
struct Artifact {
    Json description;
    std::map<std::string, Tensor> tensors;
    std::vector<Buffer> owned;
};

// Proves container, format, version, storage and checksum. Throws ArtifactError.
Artifact read_artifact(const std::byte* bytes, std::size_t size);

// SHA-256 over the description and every tensor's name, type, shape and bytes, in hexadecimal.
std::string artifact_checksum(const Json& description, const std::map<std::string, Tensor>& tensors);

// A named result: integers of a value, in their shape of one image.
struct NamedOutput {
    std::string name;
    std::size_t value;  // its number
    double scale;
    std::vector<Size> shape;
};

// A network as data; tensors are borrowed from the artifact.
struct Program {
    Value input;  // of one image: (height, width, channels), or (time steps, height, width, channels)
    std::vector<Operation> operations;
    double logit_scale;  // 1 where outputs are named
    std::optional<std::vector<std::string>> classes;
    std::vector<NamedOutput> outputs;  // empty where the last operation gives logits
};

constexpr std::size_t kOperationsMax = 10000;
constexpr std::size_t kOutputsMax = 256;
// What engines make of the tensors may take this many bytes, plus this many times the tensors' own bytes.
constexpr Size kPreparedBytesFree = Size{1} << 26;
constexpr double kPreparedRatioMax = 8;

// Throws ArtifactError unless the description is of a version of the specification that this engine runs.
void require_norm_version(const Json& description);

// Reads the description and requires that every operation reads only what an earlier one writes. The rules of the
// specification are not checked here. Throws ArtifactError, which names the operation if there is one.
Program read_program(const Artifact& artifact);

}  // namespace swincompress
