// How tensors are stored in an artifact (spec.md, section 11): narrow weights in few bits, and maps of biases by their
// distinct rows and columns.
#pragma once

#include "reader.h"

namespace swincompress {

// Unpacks the tensors listed in `packed`, {key: [bits, shape]}. Throws ArtifactError.
void unpack_tensors(Artifact& artifact, const Json& packed);

// Unfolds the maps listed in `folded`, {key: [stored row of every row, stored column of every column]}.
void unfold_maps(Artifact& artifact, const Json& folded);

}  // namespace swincompress
