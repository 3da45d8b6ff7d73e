// The coders of compressed artifacts: liblzma's raw LZMA2 and zlib's raw deflate, where the build has found them.
#pragma once

#include "artifact/safetensors.h"

namespace swincompress {

// "liblzma", "zlib" or both, of which this build lacks what it needs; nullptr if it can decode.
const char* missing_coders();

// Decodes `from` by the coder of that name to exactly `bytes` bytes at `to`, which has room for one more. Throws
// ArtifactError, at the latest one byte after the due length.
void decode(const std::string& coder, const Tensor& from, std::byte* to, Size bytes);

}  // namespace swincompress
