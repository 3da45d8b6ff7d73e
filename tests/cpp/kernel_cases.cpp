// kernel_cases FILE THREADS [IMPLEMENTATION...]: runs the cases of a file, that tests/support/kernel_case_files.py
// wrote, in the implementations named (without names in all that this CPU can run) and compares every byte with the
// norm's. For machines without Python: emulators, sanitizers, valgrind. Returns 0 where all agree.
//
// Integers are int64 in the byte order of the CPU, strings and arrays come after their length, values after type and
// shape; kernel_case_files.py has the order.
#include <cstdio>
#include <cstring>
#include <deque>
#include <fstream>
#include <iterator>
#include <thread>

#include "engine/executor.h"
#include "kernels/dispatch.h"

namespace swincompress {
namespace {

using Bytes = std::vector<std::byte>;

class Reader {
public:
    explicit Reader(const char* path) {
        std::ifstream file(path, std::ios::binary);
        content_.assign(std::istreambuf_iterator<char>(file), {});
        if (!file.is_open()) throw std::runtime_error(std::string(path) + " cannot be read");
    }

    Size integer() {
        Size value;
        std::memcpy(&value, take(sizeof(value)), sizeof(value));
        return value;
    }
    std::string text() {
        const auto size = static_cast<std::size_t>(integer());
        return {take(size), size};
    }
    // In memory of its own, so that a read past its end is found.
    Bytes bytes() {
        const auto size = static_cast<std::size_t>(integer());
        Bytes found(size);
        if (size != 0) std::memcpy(found.data(), take(size), size);
        return found;
    }
    std::vector<Size> integers() {
        std::vector<Size> found(static_cast<std::size_t>(integer()));
        for (Size& value : found) value = integer();
        return found;
    }
    Value value() {
        Value found{value_type_from_name(text()), integers(), 0};
        found.largest = integer();
        return found;
    }
    bool at_end() const { return at_ == content_.size(); }

private:
    const char* take(std::size_t size) {
        if (size > content_.size() - at_) throw std::runtime_error("the file ends too early");
        at_ += size;
        return content_.data() + at_ - size;
    }

    std::string content_;
    std::size_t at_ = 0;
};

struct Case {
    std::string label;
    Size images;
    std::vector<Value> inputs;
    std::vector<Operation> operations;
    std::deque<Bytes> memory;  // of tensors
    std::vector<Bytes> arrays;
    Bytes expected;
};

Operation read_operation(Reader& reader, std::deque<Bytes>& memory) {
    Operation operation{};
    operation.kind = reader.text();
    operation.name = reader.text();
    operation.inputs = reader.integers();
    operation.output = value_type_from_name(reader.text());
    for (Size left = reader.integer(); left > 0; --left) {
        const std::string key = reader.text();
        const bool is_list = reader.integer() != 0;
        operation.attributes[key] = {reader.integers(), is_list};
    }
    for (Size left = reader.integer(); left > 0; --left) {
        const std::string role = reader.text();
        const Type type = type_from_name(reader.text());
        const std::vector<Size> shape = reader.integers();
        memory.push_back(reader.bytes());
        operation.tensors[role] = {type, shape, memory.back().data()};
    }
    return operation;
}

Case read_case(Reader& reader) {
    Case read{};
    read.label = reader.text();
    read.images = reader.integer();
    for (Size left = reader.integer(); left > 0; --left) read.inputs.push_back(reader.value());
    for (Size left = reader.integer(); left > 0; --left) read.operations.push_back(read_operation(reader, read.memory));
    for (std::size_t i = 0; i < read.inputs.size(); ++i) read.arrays.push_back(reader.bytes());
    read.expected = reader.bytes();
    return read;
}

// Whether the case gives what is expected, also to two callers at once.
bool agrees(const Case& given, const std::string& implementation, int threads) {
    Executor engine(given.inputs, given.operations, select_kernels(implementation), Resources{threads});
    std::vector<const std::byte*> arrays;
    for (const Bytes& array : given.arrays) arrays.push_back(array.data());
    Bytes first(given.expected.size()), second(given.expected.size());
    const auto run = [&](Bytes& result) { engine.run(arrays, {result.data()}, given.images); };
    if (threads > 1) {
        std::thread other(run, std::ref(second));
        run(first);
        other.join();
    } else {
        run(first);
        second = first;
    }
    return first == given.expected && second == given.expected;
}

int compare(const char* path, int threads, const std::vector<std::string>& names) {
    Reader reader(path);
    Size cases = 0, wrong = 0;
    for (; !reader.at_end(); ++cases) {
        const Case given = read_case(reader);
        for (const std::string& name : names) {
            if (agrees(given, name, threads)) continue;
            ++wrong;
            std::printf("%s differs: %s\n", name.c_str(), given.label.c_str());
        }
    }
    for (const std::string& name : names)
        if (const Size once = select_kernels(name).peak_products(1);
            once <= 0 || select_kernels(name).peak_products(2) != 2 * once) {
            ++wrong;
            std::printf("%s: peak_products miscounts\n", name.c_str());
        }
    std::printf("%lld cases, %lld differences:", static_cast<long long>(cases), static_cast<long long>(wrong));
    for (const std::string& name : names) std::printf(" %s", name.c_str());
    std::printf("\n");
    return wrong == 0 && cases > 0 ? 0 : 1;
}

}  // namespace
}  // namespace swincompress

int main(int count, char** arguments) {
    if (count < 3) {
        std::fprintf(stderr, "kernel_cases FILE THREADS [IMPLEMENTATION...]\n");
        return 2;
    }
    std::vector<std::string> names(arguments + 3, arguments + count);
    if (names.empty()) names = swincompress::implementations();
    try {
        return swincompress::compare(arguments[1], std::stoi(arguments[2]), names);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 2;
    }
}
