#include "artifact/reader.h"

#include "artifact/coded.h"
#include "artifact/coders.h"
#include "artifact/sha256.h"
#include "artifact/storage.h"

namespace swincompress {
namespace {

constexpr const char* kFormat = "swincompress_pl.program";
constexpr const char* kMetadataKey = "swincompress_pl";
constexpr Size kVersionMax = 3;

Json parse_metadata(const std::string& text) {
    Json content;
    try {
        content = parse_json(text);
    } catch (const JsonError& error) {
        throw ArtifactError(std::string("its description is not JSON (") + error.what() + "); export it again");
    }
    const Json* format = content.find("format");
    if (format == nullptr || !format->says(kFormat))
        throw ArtifactError(std::string("its description is not a ") + kFormat + "; export it again");
    return content;
}

// 1 to kVersionMax.
Size parse_version(const Json& content) {
    const Json* version = content.find("version");
    const auto number = version == nullptr ? std::nullopt : version->integer();
    if (number && *number >= 1 && *number <= kVersionMax) return *number;
    throw ArtifactError("artifact version " + (version == nullptr ? "none" : json_text(*version)) +
                        "; this package reads versions 1 to " + std::to_string(kVersionMax) +
                        ": update it, or export the model again with it");
}

// A description that is incomplete is left to the checksum.
void refuse_other_norm(const Json& description) {
    if (description.find("norm_version") != nullptr) require_norm_version(description);
}

// A borrowed tensor may lie anywhere: int32 at an odd address is moved.
void align(Artifact& artifact) {
    for (auto& [key, tensor] : artifact.tensors) {
        const auto address = reinterpret_cast<std::uintptr_t>(tensor.data);
        if (address % static_cast<std::uintptr_t>(type_bytes(tensor.type)) == 0) continue;
        const auto* from = static_cast<const std::byte*>(tensor.data);
        Buffer& copy = artifact.owned.emplace_back(tensor.bytes());
        std::copy(from, from + tensor.bytes(), copy.data());
        tensor.data = copy.data();
    }
}

// `layout` is what a version from 2 on says of its storage.
void restore(Artifact& artifact, const Json* layout, Size version) {
    if (layout == nullptr || layout->members.empty()) throw damaged("it does not say how its tensors are stored");
    for (const JsonMember& form : layout->members)
        if (form.key != "packed" && form.key != "folded" && (form.key != "sparse" || version < 3))
            throw damaged("it does not say how its tensors are stored");
    if (const Json* packed = layout->find("packed")) unpack_tensors(artifact, *packed);
    if (const Json* sparse = layout->find("sparse")) restore_sparse(artifact, *sparse);
    if (const Json* folded = layout->find("folded")) unfold_maps(artifact, *folded);
}

}  // namespace

std::string artifact_checksum(const Json& description, const std::map<std::string, Tensor>& tensors) {
    Sha256 digest;
    digest.update(json_text(description));
    for (const auto& [key, tensor] : tensors) {
        std::string head = "[" + json_text(key) + ",\"" + type_name(tensor.type) + "\",[";
        for (const Size size : tensor.shape) head += (head.back() == '[' ? "" : ",") + std::to_string(size);
        digest.update(head + "]]");
        digest.update(tensor.data, static_cast<std::size_t>(tensor.bytes()));
    }
    return digest.finish();
}

Artifact read_artifact(const std::byte* bytes, std::size_t size) {
    Json content;
    Size version = 0;
    // Versions come before tensors and checksum: what another version wrote is not damaged.
    Container container = read_safetensors(bytes, size, kMetadataKey, [&](const std::string& text) {
        content = parse_metadata(text);
        version = parse_version(content);
        if (const Json* description = content.find("description")) refuse_other_norm(*description);
    });
    container.metadata = {};
    const Json* coded = version == 2 ? content.find("content") : nullptr;
    if (coded != nullptr && missing_coders() != nullptr)
        throw CodedError(std::string("an entropy-coded artifact, and this library is built without ") +
                         missing_coders() + "; build it with -DSWINCOMPRESS_LZMA=ON, or export without compression");
    Artifact artifact{{}, std::move(container.tensors), {}};
    align(artifact);
    if (coded != nullptr) {
        artifact.description = decode_artifact(artifact, *coded);
        refuse_other_norm(artifact.description);
    } else {
        if (version > 1) restore(artifact, content.find("storage"), version);
        if (Json* description = content.find("description")) artifact.description = std::move(*description);
    }
    const Json* sha256 = content.find("sha256");
    const bool whole = artifact.description.is(Json::Kind::object) && sha256 != nullptr;
    if (!whole || !sha256->says(artifact_checksum(artifact.description, artifact.tensors)))
        throw ArtifactError("altered after it was written (its checksum differs); copy or export it again");
    return artifact;
}

}  // namespace swincompress
