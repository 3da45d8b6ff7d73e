// Prints the best classes of one image by an artifact of swincompress_pl: no Python, no other library.
//     classify model.safetensors image [threads] [implementation]
// image: a binary PPM (P6), or the raw uint8 pixels, height x width x channels, of the size that the artifact takes.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <numeric>
#include <sstream>

#include "swincompress/engine.h"

namespace {

std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw swincompress::Error(path + ": no such file, or not readable");
    return {std::istreambuf_iterator<char>(file), {}};
}

// The next word of a PPM's header; comments run from # to the end of their line.
std::string next_word(std::istringstream& header) {
    std::string word;
    while (header >> word && word[0] == '#') std::getline(header, word);
    return word;
}

// The pixels of a P6 file (height, width, 3), which must be of the size that the engine takes.
std::string ppm_pixels(const std::string& path, const std::string& content, const swincompress::Engine& engine) {
    std::istringstream stream(content);
    const std::string magic = next_word(stream), width = next_word(stream), height = next_word(stream);
    const std::string levels = next_word(stream);
    const std::vector<std::int64_t>& shape = engine.input_shape();
    const bool fits = shape.size() == 3 && shape[2] == 3 && height == std::to_string(shape[0]) &&
                      width == std::to_string(shape[1]) && levels == "255";
    if (magic != "P6" || !stream || !fits) {
        std::string taken;
        for (const std::int64_t size : shape) taken += (taken.empty() ? "" : " x ") + std::to_string(size);
        throw swincompress::Error(path + ": a PPM of " + height + " x " + width + ", " + levels +
                                  " levels; the artifact takes " + taken + ": resize and crop the image first");
    }
    return content.substr(static_cast<std::size_t>(stream.tellg()) + 1);  // one white space ends the header
}

std::vector<std::uint8_t> read_image(const std::string& path, const swincompress::Engine& engine) {
    std::string content = read_file(path);
    if (content.size() != engine.input_size() && content.compare(0, 2, "P6") == 0)
        content = ppm_pixels(path, content, engine);
    if (content.size() != engine.input_size())
        throw swincompress::Error(path + ": " + std::to_string(content.size()) +
                                  " bytes of pixels; the artifact takes " + std::to_string(engine.input_size()));
    return {content.begin(), content.end()};
}

void print_best(const swincompress::Engine& engine, const std::vector<float>& logits) {
    std::vector<std::size_t> order(logits.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return logits[a] > logits[b]; });
    order.resize(std::min<std::size_t>(order.size(), 5));
    for (const std::size_t number : order) {
        const std::string name = engine.classes().empty() ? "" : "  " + engine.classes()[number];
        std::printf("%5zu  %9.4f%s\n", number, static_cast<double>(logits[number]), name.c_str());
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 3 || count > 5) {
        std::fprintf(stderr, "usage: classify model.safetensors image [threads] [implementation]\n");
        return 2;
    }
    try {
        swincompress::Options options;
        if (count > 3) options.threads = std::atoi(arguments[3]);
        if (count > 4) options.implementation = arguments[4];
        swincompress::Engine engine = swincompress::Engine::load(arguments[1], options);
        print_best(engine, engine.run(read_image(arguments[2], engine)));
    } catch (const swincompress::Error& error) {
        std::fprintf(stderr, "classify: %s\n", error.what());
        return 1;
    }
    return 0;
}
