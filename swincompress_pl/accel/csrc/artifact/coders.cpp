#include "artifact/coders.h"

#include <cstring>

#ifndef SWINCOMPRESS_MISSING_CODERS
#include <lzma.h>
#include <zlib.h>

#include <algorithm>
#include <memory>
#include <new>
#endif

namespace swincompress {

#ifdef SWINCOMPRESS_MISSING_CODERS

const char* missing_coders() { return SWINCOMPRESS_MISSING_CODERS; }

void decode(const std::string&, const Tensor&, std::byte*, Size) {
    throw ArtifactError(std::string("built without ") + missing_coders());
}

#else

namespace {

ArtifactError wrong_end(const char* what) {
    return damaged(std::string(what) + " stream does not end where it should");
}

// Both write to `to`, which has room for `bytes` + 1, and return the number of bytes written.
Size decode_lzma(const Tensor& from, std::byte* to, Size bytes) {
    lzma_options_lzma options{};
    options.dict_size = 1u << 20;  // and lc = lp = pb = 0
    const lzma_filter filters[] = {{LZMA_FILTER_LZMA2, &options}, {LZMA_VLI_UNKNOWN, nullptr}};
    lzma_stream stream = LZMA_STREAM_INIT;
    const std::unique_ptr<lzma_stream, decltype(&lzma_end)> ended(&stream, &lzma_end);
    if (lzma_raw_decoder(&stream, filters) != LZMA_OK) throw std::bad_alloc();
    stream.next_in = static_cast<const std::uint8_t*>(from.data);
    stream.avail_in = static_cast<std::size_t>(from.bytes());
    stream.next_out = reinterpret_cast<std::uint8_t*>(to);
    stream.avail_out = static_cast<std::size_t>(bytes) + 1;
    const lzma_ret outcome = lzma_code(&stream, LZMA_FINISH);
    if (outcome == LZMA_MEM_ERROR) throw std::bad_alloc();
    if (outcome != LZMA_STREAM_END || stream.avail_in != 0) throw wrong_end("LZMA");
    return bytes + 1 - static_cast<Size>(stream.avail_out);
}

Size decode_deflate(const Tensor& from, std::byte* to, Size bytes) {
    constexpr Size kPart = Size{1} << 30;  // zlib counts in 32 bits
    z_stream stream{};
    if (inflateInit2(&stream, -15) != Z_OK) throw std::bad_alloc();
    const std::unique_ptr<z_stream, decltype(&inflateEnd)> ended(&stream, &inflateEnd);
    stream.next_in = static_cast<Bytef*>(const_cast<void*>(from.data));
    stream.next_out = reinterpret_cast<Bytef*>(to);
    Size in_left = from.bytes(), out_left = bytes + 1;
    int outcome = Z_OK;
    while (outcome == Z_OK && out_left > 0) {
        const Size in = std::min(in_left, kPart), out = std::min(out_left, kPart);
        stream.avail_in = static_cast<uInt>(in);
        stream.avail_out = static_cast<uInt>(out);
        outcome = inflate(&stream, Z_NO_FLUSH);  // Z_BUF_ERROR where the input ends too early
        in_left -= in - static_cast<Size>(stream.avail_in);
        out_left -= out - static_cast<Size>(stream.avail_out);
    }
    if (outcome == Z_MEM_ERROR) throw std::bad_alloc();
    if (outcome != Z_STREAM_END || in_left != 0) throw wrong_end("deflate");
    return bytes + 1 - out_left;
}

}  // namespace

const char* missing_coders() { return nullptr; }

void decode(const std::string& coder, const Tensor& from, std::byte* to, Size bytes) {
    Size found = from.bytes();
    if (coder == "lzma")
        found = decode_lzma(from, to, bytes);
    else if (coder == "huffman")
        found = decode_deflate(from, to, bytes);
    else if (coder != "none")
        throw damaged("coder " + coder + " is unknown");
    else if (found == bytes)
        std::memcpy(to, from.data, static_cast<std::size_t>(bytes));
    if (found != bytes)
        throw damaged("a stream does not hold the " + std::to_string(bytes) + " bytes that it declares");
}

#endif

}  // namespace swincompress
