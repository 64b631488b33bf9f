// The Python module `_C`: importing it registers the ops; its functions choose the kernels, launch
// those that Triton compiled, and say what a network takes on a GPU.

#include <Python.h>

#include <cstring>
#include <exception>
#include <memory>

#include "common/kernel_launch.h"
#include "cpu/instruction_sets.h"
#include "cpu/plan_cache.h"
#include "cuda/smem_layout.h"

namespace {

PyObject* isas(PyObject*, PyObject*) {
  PyObject* list = PyList_New(0);
  for (const char* const* name = maskmoe::isas(); list != nullptr && *name != nullptr; ++name) {
    PyObject* text = PyUnicode_FromString(*name);
    if (text == nullptr || PyList_Append(list, text) != 0) Py_CLEAR(list);
    Py_XDECREF(text);
  }
  return list;
}

PyObject* isa(PyObject*, PyObject*) {
  const maskmoe::Kernels* k = maskmoe::kernels();
  if (k == nullptr) Py_RETURN_NONE;
  return PyUnicode_FromString(k->name);
}

PyObject* set_isa(PyObject*, PyObject* name) {
  Py_ssize_t size;
  const char* text = PyUnicode_AsUTF8AndSize(name, &size);
  if (text == nullptr) return nullptr;
  return PyBool_FromLong(maskmoe::set_isa(text));
}

PyObject* forget(PyObject*, PyObject* id) {
  const long long number = PyLong_AsLongLong(id);
  if (number == -1 && PyErr_Occurred()) return nullptr;
  maskmoe::forget_plans(number);
  Py_RETURN_NONE;
}

PyObject* compiled(PyObject*, PyObject*) { return PyLong_FromLongLong(maskmoe::count_plans()); }

// --- Launches: see kernel_launch.h --------------------------------------------------------------

constexpr char kLaunch[] = "maskmoe.launch";

template <class F>
F function_at(unsigned long long address) {
  return reinterpret_cast<F>(static_cast<uintptr_t>(address));
}

maskmoe::KernelLaunch* launch_of(PyObject* capsule) {
  return static_cast<maskmoe::KernelLaunch*>(PyCapsule_GetPointer(capsule, kLaunch));
}

// The items of lists of bytes, integers and descriptors. False: a Python error is set.
bool read(PyObject* item, std::string& bytes) {
  char* data;
  Py_ssize_t size;
  if (PyBytes_AsStringAndSize(item, &data, &size) != 0) return false;
  bytes.assign(data, static_cast<size_t>(size));
  return true;
}

bool read(PyObject* item, int64_t& number) {
  number = PyLong_AsLongLong(item);
  return number != -1 || !PyErr_Occurred();
}

bool read(PyObject* item, maskmoe::Described& d) {
  unsigned long long address, parameter, columns, rows, stride;
  int is_small;
  if (!PyArg_ParseTuple(item, "KKiiKKKIIp", &address, &parameter, &d.type, &d.swizzle, &columns,
                        &rows, &stride, &d.box[0], &d.box[1], &is_small)) {
    return false;
  }
  d.address = address, d.parameter = parameter, d.stride = stride;
  d.sizes[0] = columns, d.sizes[1] = rows, d.is_small = is_small != 0;
  return true;
}

template <class T>
bool read(PyObject* list, std::vector<T>& items) {
  for (Py_ssize_t k = 0; k < PyList_Size(list); ++k) {
    if (!read(PyList_GetItem(list, k), items.emplace_back())) return false;
  }
  return true;
}

PyObject* prepare_launch(PyObject*, PyObject* given) {
  unsigned long long functions[5], kernel;
  maskmoe::KernelLaunch::Shape shape;
  PyObject *parameters, *places, *described;
  if (!PyArg_ParseTuple(given, "(KKKKK)(KIIIII)O!O!O!", &functions[0], &functions[1], &functions[2],
                        &functions[3], &functions[4], &kernel, &shape.grid[0], &shape.grid[1],
                        &shape.grid[2], &shape.threads, &shape.shared, &PyList_Type, &parameters,
                        &PyList_Type, &places, &PyList_Type, &described)) {
    return nullptr;
  }
  maskmoe::Driver driver;
  driver.launch_kernel = function_at<decltype(driver.launch_kernel)>(functions[0]);
  driver.encode_tiled = function_at<decltype(driver.encode_tiled)>(functions[1]);
  driver.current_context = function_at<decltype(driver.current_context)>(functions[2]);
  driver.set_context = function_at<decltype(driver.set_context)>(functions[3]);
  driver.error_text = function_at<decltype(driver.error_text)>(functions[4]);
  shape.function = function_at<void*>(kernel);
  std::vector<std::string> values;
  std::vector<int64_t> at;
  std::vector<maskmoe::Described> maps;
  if (!read(parameters, values) || !read(places, at) || !read(described, maps)) return nullptr;
  try {
    auto made = std::make_unique<maskmoe::KernelLaunch>(driver, shape, values, at, maps);
    PyObject* capsule =
        PyCapsule_New(made.get(), kLaunch, [](PyObject* of) { delete launch_of(of); });
    if (capsule != nullptr) made.release();
    return capsule;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

PyObject* launch(PyObject*, PyObject* const* given, Py_ssize_t count) {
  constexpr Py_ssize_t kMost = 32;  // addresses
  maskmoe::KernelLaunch* kernel = count < 2 ? nullptr : launch_of(given[0]);
  if (kernel == nullptr || static_cast<size_t>(count - 2) != kernel->count() || count > kMost) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "a launch, a stream, its addresses");
    return nullptr;
  }
  uint64_t numbers[kMost];  // the stream, then the addresses
  for (Py_ssize_t k = 1; k < count; ++k) numbers[k - 1] = PyLong_AsUnsignedLongLong(given[k]);
  if (PyErr_Occurred()) return nullptr;
  maskmoe::KernelLaunch::Parameters parameters;
  int status = kernel->prepare(numbers + 1, parameters);
  if (status == 0) {  // waits where the queue is full
    Py_BEGIN_ALLOW_THREADS;
    status = kernel->launch(reinterpret_cast<void*>(numbers[0]), parameters);
    Py_END_ALLOW_THREADS;
  }
  if (status == 0) Py_RETURN_NONE;
  PyErr_SetString(PyExc_RuntimeError, kernel->error(status).c_str());
  return nullptr;
}

// --- Networks on a GPU --------------------------------------------------------------------------

// Bytes of shared memory that a tile of few rows takes in training, for numbers of 2 and 4 bytes,
// where the derivative of the activation is kept, too. A text: why the CUDA kernels do not compute the
// MLP.
PyObject* mlp_bytes(PyObject*, PyObject* given) {
  PyObject* list;
  long long features;
  if (!PyArg_ParseTuple(given, "O!L", &PyList_Type, &list, &features)) return nullptr;
  std::vector<std::string> contents;
  if (!read(list, contents)) return nullptr;
  std::vector<std::vector<int64_t>> values;
  std::vector<maskmoe::Encoded> layouts;
  for (const std::string& bytes : contents) {
    std::vector<int64_t>& of = values.emplace_back(bytes.size() / sizeof(int64_t));
    std::memcpy(of.data(), bytes.data(), of.size() * sizeof(int64_t));
    layouts.push_back({of.data(), static_cast<int64_t>(of.size())});
  }
  using namespace maskmoe::fused;
  try {
    const CompiledPlan compiled(layouts, {features});
    const ExecutionPlan plan = compiled.at(compiled.bytes().data());
    const auto bytes = [&](int item_size) -> long long {
      return smem_layout(plan, {Op::kGem, item_size, true}, min_tile_rows(item_size)).bytes;
    };
    return Py_BuildValue("(LL)", bytes(2), bytes(4));
  } catch (const std::exception& error) {
    return PyUnicode_FromString(error.what());
  }
}

PyMethodDef methods[] = {
    {"isas", isas, METH_NOARGS, "Kernels that this build has and this machine can run."},
    {"isa", isa, METH_NOARGS, "The kernels that run, or None."},
    {"set_isa", set_isa, METH_O, "Run these kernels; '' for the best. False: not here."},
    {"forget", forget, METH_O, "Free the execution plans of the layout with this id."},
    {"compiled", compiled, METH_NOARGS, "How many execution plans are kept."},
    {"prepare_launch", prepare_launch, METH_VARARGS,
     "A launch of a kernel, given the driver's functions, its shape and its parameters."},
    {"launch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(launch)), METH_FASTCALL,
     "Launch what was prepared on a stream, with these addresses."},
    {"mlp_bytes", mlp_bytes, METH_VARARGS,
     "Shared memory that an MLP takes on a GPU, given its serialized layouts and its features."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module{PyModuleDef_HEAD_INIT, "_C", "Kernels.", -1, methods,
                   nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
