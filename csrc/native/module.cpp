// fastpose._native: what is naturally a function on plain values or numpy arrays, free of torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "native/grouping.h"

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
  d["cuda"] = FASTPOSE_CUDA;
  return d;
}

using Floats = py::array_t<float, py::array::c_style>;

// Shapes are checked by the caller, and here against reading out of bounds.
py::tuple group_people(const Floats& heatmaps, const Floats& tags, const std::vector<int64_t>& order,
                       int64_t max_people, float detection_threshold, double tag_threshold, int64_t window,
                       bool refine) {
  if (heatmaps.ndim() != 3 || tags.ndim() != 4 || !std::equal(heatmaps.shape(), heatmaps.shape() + 3, tags.shape() + 1))
    throw py::value_error("expected heatmaps [K, H, W] and tags [L, K, H, W]");
  const fastpose::TagMaps maps{heatmaps.data(),   tags.data(),       tags.shape(0),
                               heatmaps.shape(0), heatmaps.shape(1), heatmaps.shape(2)};
  if (int64_t(order.size()) != maps.keypoints ||
      std::any_of(order.begin(), order.end(), [&](int64_t k) { return k < 0 || k >= maps.keypoints; }))
    throw py::value_error("order must hold the keypoints' indices");
  fastpose::People people;
  {
    const py::gil_scoped_release release;
    people =
        fastpose::group_people(maps, order.data(), {max_people, detection_threshold, tag_threshold, window, refine});
  }
  const int64_t count = people.scores.size();
  Floats keypoints({count, maps.keypoints, int64_t(3)}), scores(count);
  std::copy(people.keypoints.begin(), people.keypoints.end(), keypoints.mutable_data());
  std::copy(people.scores.begin(), people.scores.end(), scores.mutable_data());
  return py::make_tuple(keypoints, scores);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Processor and build information, and grouping of keypoints; numpy arrays in and out";
  m.def("cpu_info", &cpu_info,
        "model name, 'isa' in use (after FASTPOSE_CPU_ISA) and 'detected': baseline, avx2, avx512, avx512_vnni, "
        "avx512_bf16 or amx");
  m.def("build_info", &build_info,
        "version, compiler, torch of the build, lowest torch it runs on, GPUs it was built for");
  m.def("group_people", &group_people, "see fastpose.grouping.group_people", py::arg("heatmaps").noconvert(),
        py::arg("tags").noconvert(), py::arg("order"), py::arg("max_people"), py::arg("detection_threshold"),
        py::arg("tag_threshold"), py::arg("window"), py::arg("refine"));
}
