// The Python module mae_fast._C. Importing it loads this library, which registers the kernels with
// torch's dispatcher.
#define Py_LIMITED_API 0x030A0000 // one build works with Python 3.10 and newer
#include <Python.h>

#include "cpu/matrix_unit.h"

static PyObject *cpu_isa(PyObject *, PyObject *) {
  constexpr const char *names[] = {"baseline", "avx2", "avx512"};
  return PyUnicode_FromString(names[static_cast<int>(mae_fast::isa())]);
}

static PyObject *has_matrix_unit(PyObject *, PyObject *) {
  return PyBool_FromLong(mae_fast::matrix_unit::available());
}

static PyMethodDef methods[] = {{"cpu_isa", cpu_isa, METH_NOARGS,
                                 "Instruction set of the CPU kernels: baseline, avx2 or avx512."},
                                {"has_matrix_unit", has_matrix_unit, METH_NOARGS,
                                 "Whether oneDNN has bf16 matrix products on this CPU."},
                                {nullptr, nullptr, 0, nullptr}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
