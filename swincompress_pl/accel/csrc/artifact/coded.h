// Compressed artifacts: tensors of one kind together in a stream, description and storage in one more.
#pragma once

#include "artifact/reader.h"

namespace swincompress {

// Replaces the artifact's tensors, which are streams, by those that they hold, and returns the description; an empty
// value where there is none. `declared` is what the metadata say of the stream `content`. What it declares is bounded
// by the bytes that are there, before memory is taken. Throws ArtifactError.
Json decode_artifact(Artifact& artifact, const Json& declared);

}  // namespace swincompress
