// The Python module `_C`: importing it registers the ops; its functions choose the kernels.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cpu/instruction_sets.h"
#include "cpu/plan_cache.h"

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

PyMethodDef methods[] = {
    {"isas", isas, METH_NOARGS, "Kernels that this build has and this machine can run."},
    {"isa", isa, METH_NOARGS, "The kernels that run, or None."},
    {"set_isa", set_isa, METH_O, "Run these kernels; '' for the best. False: not here."},
    {"forget", forget, METH_O, "Free the execution plans of the layout with this id."},
    {"compiled", compiled, METH_NOARGS, "How many execution plans are kept."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module{PyModuleDef_HEAD_INIT, "_C", "Kernels for the CPU.", -1, methods,
                   nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
