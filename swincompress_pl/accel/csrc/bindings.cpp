// Registers the engine as swincompress_pl.accel._core. Python owns the interface; this file converts and checks
// arguments.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "engine/model.h"
#include "engine/peak.h"
#include "engine/process.h"
#include "gil.h"
#include "kernels/dispatch.h"

namespace py = pybind11;

namespace swincompress {
namespace {

constexpr Size kBlockBytesMax = Size{1} << 26;

Type type_of(const py::array& array) {
    const py::dtype dtype = array.dtype();
    if (dtype.kind() == 'u' && dtype.itemsize() == 1) return Type::uint8;
    if (dtype.kind() == 'i') {
        switch (dtype.itemsize()) {
            case 1: return Type::int8;
            case 2: return Type::int16;
            case 4: return Type::int32;
            case 8: return Type::int64;
            default: break;
        }
    }
    throw std::invalid_argument("array of " + std::string(py::str(py::object(dtype))) +
                                "; arrays must be int8, uint8, int16, int32 or int64");
}

py::dtype dtype_of(Type type) { return py::dtype(std::string(type_name(type))); }

std::vector<Size> shape_of(const py::array& array) { return {array.shape(), array.shape() + array.ndim()}; }

void require_contiguous(const py::array& array, const std::string& what) {
    if ((array.flags() & py::array::c_style) == 0) throw std::invalid_argument(what + " is not C-contiguous");
}

// (type, shape, largest)
Value value_of(const py::handle& given) {
    const auto [type, shape, largest] = given.cast<std::tuple<std::string, std::vector<Size>, Size>>();
    if (shape.empty()) throw std::invalid_argument("a value needs at least one axis");
    const ValueType declared = value_type_from_name(type);
    if (largest < 0 || largest > declared.limit)
        throw std::invalid_argument("a value of " + type + " cannot reach " + std::to_string(largest));
    return {declared, shape, largest};
}

Attribute attribute_of(const py::handle& value) {
    if (py::isinstance<py::int_>(value)) return {{value.cast<Size>()}, false};
    return {value.cast<std::vector<Size>>(), true};
}

// (bytes, percent), as in Tuning
Tuning tuning_of(const std::pair<Size, Size>& given) {
    const auto [bytes, percent] = given;
    if (bytes < 0 || bytes > kBlockBytesMax || percent < -1 || percent > kEventsOnly)
        throw std::invalid_argument("tuning is (" + std::to_string(bytes) + ", " + std::to_string(percent) +
                                    "); it must lie in [0, " + std::to_string(kBlockBytesMax) + "] and [-1, " +
                                    std::to_string(kEventsOnly) + "]");
    return {bytes, percent};
}

// {"kind", "name", "inputs": numbers, "dtype": of the output, "attributes": {...}, "tensors": {role: array}}, and
// perhaps "tuning"
Operation operation_of(const py::dict& given) {
    Operation operation{};
    operation.kind = given["kind"].cast<std::string>();
    operation.name = given["name"].cast<std::string>();
    operation.inputs = given["inputs"].cast<std::vector<Size>>();
    operation.output = value_type_from_name(given["dtype"].cast<std::string>());
    for (const auto& [key, value] : given["attributes"].cast<py::dict>())
        operation.attributes[key.cast<std::string>()] = attribute_of(value);
    for (const auto& [key, value] : given["tensors"].cast<py::dict>()) {
        const auto role = key.cast<std::string>();
        const auto array = value.cast<py::array>();
        require_contiguous(array, "tensor '" + role + "'");
        operation.tensors[role] = {type_of(array), shape_of(array), array.data()};
    }
    if (given.contains("tuning")) operation.tuning = tuning_of(given["tuning"].cast<std::pair<Size, Size>>());
    return operation;
}

// The engine gives the values with the numbers `results`, or without any the output of the last operation.
std::unique_ptr<Executor> make_engine(const py::sequence& inputs, const py::sequence& operations,
                                      const std::string& implementation, int threads,
                                      const std::vector<std::size_t>& results) {
    require_threads(threads);
    std::vector<Value> values;
    for (const auto& input : inputs) values.push_back(value_of(input));
    std::vector<Operation> list;
    for (const auto& operation : operations) list.push_back(operation_of(operation.cast<py::dict>()));
    return std::make_unique<Executor>(std::move(values), list, select_kernels(implementation), Resources{threads},
                                      results);
}

std::pair<const std::byte*, std::size_t> bytes_of(const py::buffer_info& content) {
    return {static_cast<const std::byte*>(content.ptr), static_cast<std::size_t>(content.size * content.itemsize)};
}

// (engine, {"input_shape", "logit_scale", "class_count", "classes", "outputs": (name, type, shape, scale) of each})
// spend: the content is writable and nobody else's; what it holds is lost.
std::pair<std::unique_ptr<Executor>, py::dict> load(const py::buffer& content, const std::string& implementation,
                                                    int threads, bool spend,
                                                    const std::map<std::size_t, std::pair<Size, Size>>& tunings) {
    const py::buffer_info info = content.request(spend);
    const auto [bytes, size] = bytes_of(info);
    const Kernels& kernels = select_kernels(implementation);
    Resources resources{threads, Resources{}.memory_bytes_max, spend};
    for (const auto& [number, tuning] : tunings) resources.tunings[number] = tuning_of(tuning);
    Model model = [&, bytes = bytes, size = size] {
        const GilRelease release;
        return load_model(bytes, size, kernels, resources);
    }();
    py::dict facts;
    facts["input_shape"] = py::tuple(py::cast(model.input.shape));
    facts["logit_scale"] = model.logit_scale;
    facts["class_count"] = model.class_count();
    facts["classes"] = model.classes ? py::object(py::tuple(py::cast(*model.classes))) : py::none();
    py::list outputs;
    for (std::size_t i = 0; i < model.outputs.size(); ++i) {
        const NamedOutput& output = model.outputs[i];
        const std::string type = type_name(model.result(i).type());
        outputs.append(py::make_tuple(output.name, type, py::tuple(py::cast(output.shape)), output.scale));
    }
    facts["outputs"] = outputs;
    return {std::move(model.executor), facts};
}

// (description as JSON, {key: array}) of an artifact with the right checksum; the rules are not checked.
std::pair<std::string, py::dict> read_content(const py::buffer& content) {
    const py::buffer_info info = content.request();
    const auto [bytes, size] = bytes_of(info);
    const Artifact artifact = [&, bytes = bytes, size = size] {
        const GilRelease release;
        return read_artifact(bytes, size);
    }();
    py::dict tensors;
    for (const auto& [key, tensor] : artifact.tensors) {
        py::array copy(dtype_of(tensor.type), tensor.shape);
        std::memcpy(copy.mutable_data(), tensor.data, static_cast<std::size_t>(copy.nbytes()));
        tensors[py::str(key)] = copy;
    }
    return {json_text(artifact.description), tensors};
}

// (description, storage) of a compressed artifact's content, each as JSON; None where there is none.
std::pair<std::optional<std::string>, std::optional<std::string>> parse_content(const py::buffer& content) {
    const py::buffer_info info = content.request();
    const auto [bytes, size] = bytes_of(info);
    const GilRelease release;
    const Json parsed = parse_json({reinterpret_cast<const char*>(bytes), size});
    const auto part = [&](const char* key) {
        const Json* found = parsed.find(key);
        return found == nullptr ? std::nullopt : std::make_optional(json_text(*found));
    };
    return {part("description"), part("storage")};
}

// Keeps `array` and the arrays whose memory it shows from being resized, which would free what is being read. NumPy
// refuses to resize while there are weak references, even with refcheck=False. Other owners of memory (bytearray, mmap)
// refuse it themselves while an array shows it.
void hold(py::object owner, std::vector<py::weakref>& holds) {
    while (owner && py::isinstance<py::array>(owner)) {
        holds.emplace_back(owner);
        owner = py::reinterpret_borrow<py::array>(owner).base();
    }
}

struct Batch {
    std::vector<const std::byte*> data;
    Size images;
    std::vector<py::weakref> holds;
};

// The arrays are (images, *shape of the value), C-contiguous.
Batch batch_of(const Executor& engine, const std::vector<py::array>& arrays) {
    const Plan& plan = engine.plan();
    if (arrays.size() != plan.input_count())
        throw std::invalid_argument("takes " + std::to_string(plan.input_count()) + " arrays");
    Batch batch{{}, arrays.front().ndim() > 0 ? arrays.front().shape(0) : 0, {}};
    for (std::size_t i = 0; i < arrays.size(); ++i) {
        std::vector<Size> expected = plan.value(i).shape;
        expected.insert(expected.begin(), batch.images);
        if (type_of(arrays[i]) != plan.value(i).type() || shape_of(arrays[i]) != expected)
            throw std::invalid_argument("array " + std::to_string(i) + " is " + type_name(type_of(arrays[i])) + " " +
                                        shape_text(shape_of(arrays[i])) + "; it must be " +
                                        type_name(plan.value(i).type()) + " " + shape_text(expected));
        require_contiguous(arrays[i], "array " + std::to_string(i));
        hold(arrays[i], batch.holds);
        batch.data.push_back(static_cast<const std::byte*>(arrays[i].data()));
    }
    return batch;
}

// Arrays (images, *shape of the value), one per result.
struct Results {
    std::vector<py::array> arrays;
    std::vector<std::byte*> data;
};

Results results_of(const Executor& engine, Size images) {
    Results results;
    for (const std::size_t number : engine.plan().results()) {
        const Value& value = engine.plan().value(number);
        std::vector<Size> shape = value.shape;
        shape.insert(shape.begin(), images);
        py::array& array = results.arrays.emplace_back(dtype_of(value.type()), shape);
        results.data.push_back(static_cast<std::byte*>(array.mutable_data()));
    }
    return results;
}

Executor::Watch watch(GilRelease& gil, std::vector<Size>* ns = nullptr, std::vector<SpikeCounts>* spikes = nullptr) {
    return {ns, spikes, [&gil] { gil.check_signals(); }};
}

std::vector<py::array> run_all(Executor& engine, const std::vector<py::array>& arrays) {
    const Batch batch = batch_of(engine, arrays);
    const Results results = results_of(engine, batch.images);
    without_gil([&](GilRelease& gil) { engine.run(batch.data, results.data, batch.images, watch(gil)); });
    return results.arrays;
}

// The first result, of an engine that has one.
py::array run(Executor& engine, const std::vector<py::array>& arrays) { return run_all(engine, arrays).front(); }

py::array_t<Size> profile(Executor& engine, const std::vector<py::array>& arrays, int repeats) {
    if (repeats < 1) throw std::invalid_argument("repeats is " + std::to_string(repeats) + "; it must be at least 1");
    const Batch batch = batch_of(engine, arrays);
    const Results results = results_of(engine, batch.images);
    const std::size_t count = engine.plan().steps().size();
    py::array_t<Size> times({static_cast<std::size_t>(repeats), count});
    auto* rows = times.mutable_data();
    without_gil([&](GilRelease& gil) {
        for (int repeat = 0; repeat < repeats; ++repeat) {
            std::vector<Size> step_ns(count, 0);
            engine.run(batch.data, results.data, batch.images, watch(gil, &step_ns));
            std::copy(step_ns.begin(), step_ns.end(), rows + static_cast<Size>(count) * repeat);
            gil.check_signals();
        }
    });
    return times;
}

// (steps, 3): spikes written, their places, synaptic operations
py::array_t<Size> count_spikes(Executor& engine, const std::vector<py::array>& arrays) {
    const Batch batch = batch_of(engine, arrays);
    const Results results = results_of(engine, batch.images);
    const std::size_t count = engine.plan().steps().size();
    py::array_t<Size> counts({count, std::size_t{3}});
    auto* rows = counts.mutable_data();
    std::vector<SpikeCounts> found(count);
    without_gil(
        [&](GilRelease& gil) { engine.run(batch.data, results.data, batch.images, watch(gil, nullptr, &found)); });
    for (const SpikeCounts& each : found) {
        *rows++ = each.spikes;
        *rows++ = each.places;
        *rows++ = each.operations;
    }
    return counts;
}

double peak_gmacs(const std::string& implementation, int threads) {
    require_threads(threads);
    const Kernels& kernels = select_kernels(implementation);
    const GilRelease release;
    return measure_peak_gmacs(kernels, threads);
}

std::vector<std::vector<std::size_t>> steps(const Executor& engine) {
    std::vector<std::vector<std::size_t>> covered;
    for (const PlannedStep& step : engine.plan().steps()) covered.push_back(step.operations);
    return covered;
}

}  // namespace
}  // namespace swincompress

PYBIND11_MODULE(_core, module) {
    using namespace swincompress;
    module.doc() = "The integer engine; use it through swincompress_pl.accel.";
    module.def("usable_cpus", &usable_cpus, py::arg("root") = "");
    module.def("implementations", &implementations);
    module.def(
        "select", [](const std::string& name) { return std::string(select_kernels(name).name); },
        py::arg("implementation") = "");
    module.def(
        "event_largest", [](const std::string& name) { return select_kernels(name).event_largest; },
        py::arg("implementation"));
    module.def("peak_gmacs", &peak_gmacs, py::arg("implementation"), py::arg("threads"));
    py::register_exception<CodedError>(module, "CodedError", PyExc_ValueError);
    module.def("load", &load, py::arg("content"), py::arg("implementation"), py::arg("threads"),
               py::arg("spend") = false, py::arg("tunings") = std::map<std::size_t, std::pair<Size, Size>>{});
    module.def("read", &read_content, py::arg("content"));
    module.def("parse_content", &parse_content, py::arg("content"));
    py::class_<Executor>(module, "Engine")
        .def(py::init(&make_engine), py::arg("inputs"), py::arg("operations"), py::arg("implementation") = "",
             py::arg("threads") = 1, py::arg("results") = std::vector<std::size_t>{})
        .def("run", &run, py::arg("arrays"))
        .def("run_all", &run_all, py::arg("arrays"))
        .def("profile", &profile, py::arg("arrays"), py::arg("repeats"))
        .def("count_spikes", &count_spikes, py::arg("arrays"))
        .def_property_readonly("implementation", &Executor::implementation)
        .def_property_readonly("threads", &Executor::threads)
        .def_property_readonly("steps", &steps)
        .def_property_readonly("chunk", [](const Executor& engine) { return engine.plan().chunk(); })
        .def_property_readonly("arena_bytes", [](const Executor& engine) { return engine.plan().arena_bytes(); });
}
