// How tensors lie in an artifact (spec.md, section 11): narrow weights in few bits, maps of biases by their
// different rows and columns.
#pragma once

#include "reader.h"

namespace swincompress {

// packed: {key: [bits, shape]}. Replaces the tensors that it lists by what they hold. Throws ArtifactError.
void unpack_tensors(Artifact& artifact, const Json& packed);

// folded: {key: [which row every row is, which column every column is]}.
void unfold_maps(Artifact& artifact, const Json& folded);

}  // namespace swincompress
