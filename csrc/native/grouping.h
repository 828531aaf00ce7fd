// Associative embedding: heatmaps and tag maps of an image to people. See fastpose/grouping.py, which states the rules
// and has the same algorithm in numpy.
#pragma once

#include <cstdint>
#include <vector>

namespace fastpose {

struct GroupingOptions {
  int64_t max_people;
  float detection_threshold;
  double tag_threshold;
  int64_t window;  // odd
  bool refine;
};

// The maps of one image: heatmaps [keypoints][height][width], tags [dims][keypoints][height][width].
struct TagMaps {
  const float *heatmaps, *tags;
  int64_t dims, keypoints, height, width;
};

struct People {
  std::vector<float> keypoints;  // [P][keypoints][3]: x, y, value of the heatmap; 0 where there is none
  std::vector<float> scores;     // [P]
};

// `order`: the keypoints in the order in which they are assigned.
People group_people(const TagMaps& maps, const int64_t* order, const GroupingOptions& options);

}  // namespace fastpose
