// How tensors are stored in an artifact (spec.md, section 11): narrow weights in few bits, weights with many zeros by
// their nonzeros, and maps of biases by their distinct rows and columns.
#pragma once

#include "artifact/reader.h"

namespace swincompress {

// The shape of tensor `key` as a list of sizes. Throws ArtifactError.
std::vector<Size> parse_shape(const std::string& key, const Json& sizes);

// Throws ArtifactError unless the bits behind the first `bits` of their last byte are 0.
void require_padding(const std::uint8_t* from, Size bits);

// Unpacks the tensors listed in `packed`, {key: [bits, shape]}. Throws ArtifactError.
void unpack_tensors(Artifact& artifact, const Json& packed);

// Restores the tensors listed in `sparse`, {key: [bits, shape]}.
void restore_sparse(Artifact& artifact, const Json& sparse);

// Unfolds the maps listed in `folded`, {key: [stored row of every row, stored column of every column]}.
void unfold_maps(Artifact& artifact, const Json& folded);

}  // namespace swincompress
