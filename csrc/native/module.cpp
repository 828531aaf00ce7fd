// fastpose._native: what is naturally a function on plain values or numpy arrays, free of torch.
#include <pybind11/pybind11.h>

#include <fstream>
#include <string>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind("model name", 0) == 0) {
      const size_t colon = line.find(": ");
      return colon == std::string::npos ? "" : line.substr(colon + 2);
    }
  }
  return "";
}

py::dict cpu_info() {
  py::dict d;
  d["model"] = processor_name();
  d["isa"] = fastpose::isa_name(fastpose::isa());
  d["detected"] = fastpose::isa_name(fastpose::detected_isa());
  return d;
}

py::dict build_info() {
  py::dict d;
  d["version"] = FASTPOSE_VERSION;
  d["torch"] = FASTPOSE_BUILD_TORCH;
  d["torch_target"] = FASTPOSE_TORCH_TARGET;
#if defined(__clang__)
  d["compiler"] = "clang " __clang_version__;
#else
  d["compiler"] = "gcc " __VERSION__;
#endif
  d["cuda"] = false;
  return d;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Processor and build information";
  m.def("cpu_info", &cpu_info,
        "model name, 'isa' in use (after FASTPOSE_CPU_ISA) and 'detected': baseline, avx2 or avx512");
  m.def("build_info", &build_info, "version, compiler, torch of the build, lowest torch it runs on, cuda");
}
