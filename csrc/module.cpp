// The Python module mae_fast._C. Importing it loads this library, whose op files then register
// their kernels with torch's dispatcher; the module itself is empty.
#define Py_LIMITED_API 0x030A0000 // one build serves every Python from 3.10 on
#include <Python.h>

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
