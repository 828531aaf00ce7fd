#include "native/grouping.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace fastpose {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLargestDistance = 1e6;  // keeps the costs below exact in their last digits
constexpr double kTieBreak = 1e-7;

// Maps are searched by tiles whose bounds are known, so that most of them need not be looked at.
constexpr int64_t kTileHeight = 8, kTileWidth = 16;

struct Tiling {
  int64_t height, width;  // of the map

  int64_t columns() const { return (width + kTileWidth - 1) / kTileWidth; }
  int64_t count() const { return (height + kTileHeight - 1) / kTileHeight * columns(); }

  // Calls visit(cell, count) for each row of the tile: its first cell and the number of cells.
  template <class Visit>
  void rows(int64_t tile, const Visit& visit) const {
    const int64_t top = tile / columns() * kTileHeight, left = tile % columns() * kTileWidth;
    const int64_t count = std::min(kTileWidth, width - left);
    for (int64_t y = top; y < std::min(height, top + kTileHeight); ++y) visit(y * width + left, count);
  }
};

constexpr int kLanes = 4;  // what every x86-64 and ARM64 processor has
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
using LaneMask = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

// The first `count` of kLanes values, the others `fill`.
inline Lanes load(const float* values, int64_t count, float fill) {
  Lanes lanes;
  if (count >= kLanes) {
    std::memcpy(&lanes, values, sizeof(lanes));
  } else {
    for (int j = 0; j < kLanes; ++j) lanes[j] = j < count ? values[j] : fill;
  }
  return lanes;
}

inline bool any(LaneMask mask) {
  uint64_t words[sizeof(mask) / sizeof(uint64_t)], all = 0;
  std::memcpy(words, &mask, sizeof(mask));
  for (uint64_t word : words) all |= word;
  return all != 0;
}

struct Range {
  float low = std::numeric_limits<float>::infinity(), high = -std::numeric_limits<float>::infinity();
};

// Least and greatest value of every tile of a map, NaN ignored.
std::vector<Range> tile_ranges(const float* map, const Tiling& tiling) {
  std::vector<Range> ranges(tiling.count());
  for (size_t tile = 0; tile < ranges.size(); ++tile) {
    Range& range = ranges[tile];
    Lanes low = Lanes{} + range.low, high = Lanes{} + range.high;
    tiling.rows(tile, [&](int64_t cell, int64_t count) {
      for (int64_t i = 0; i < count; i += kLanes) {
        const Lanes value = load(map + cell + i, count - i, std::nanf(""));
        low = value < low ? value : low;
        high = value > high ? value : high;
      }
    });
    for (int j = 0; j < kLanes; ++j) range = {std::min(range.low, low[j]), std::max(range.high, high[j])};
  }
  return ranges;
}

struct Candidate {
  int64_t cell;
  float value;
};

// The local maxima above the threshold, the first of equal ones, sorted by value, at most `max_people`.
std::vector<Candidate> find_candidates(const TagMaps& maps, int64_t keypoint, const std::vector<Range>& tiles,
                                       const GroupingOptions& options) {
  const int64_t cells = maps.height * maps.width, half = options.window / 2;
  const Tiling tiling{maps.height, maps.width};
  const float* map = maps.heatmaps + keypoint * cells;
  // whether no finite value around is greater, or equal and before this one
  const auto is_peak = [&](int64_t cell) {
    const int64_t y = cell / maps.width, x = cell % maps.width;
    for (int64_t v = std::max<int64_t>(y - half, 0); v <= std::min(y + half, maps.height - 1); ++v) {
      for (int64_t u = std::max<int64_t>(x - half, 0); u <= std::min(x + half, maps.width - 1); ++u) {
        const int64_t other = v * maps.width + u;
        if (std::isfinite(map[other]) && (map[other] > map[cell] || (map[other] == map[cell] && other < cell))) {
          return false;
        }
      }
    }
    return true;
  };
  const auto has_tags = [&](int64_t cell) {
    for (int64_t d = 0; d < maps.dims; ++d) {
      if (!std::isfinite(maps.tags[(d * maps.keypoints + keypoint) * cells + cell])) return false;
    }
    return true;
  };
  std::vector<Candidate> found;
  for (size_t tile = 0; tile < tiles.size(); ++tile) {
    if (!(tiles[tile].high > options.detection_threshold)) continue;
    tiling.rows(tile, [&](int64_t first, int64_t count) {
      for (int64_t cell = first; cell < first + count; ++cell) {
        const float value = map[cell];
        if (value > options.detection_threshold && std::isfinite(value) && is_peak(cell) && has_tags(cell)) {
          found.push_back({cell, value});
        }
      }
    });
  }
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.value != b.value ? a.value > b.value : a.cell < b.cell;
  };
  const size_t kept = std::min<size_t>(found.size(), options.max_people);
  std::partial_sort(found.begin(), found.begin() + kept, found.end(), better);
  found.resize(kept);
  return found;
}

// Assignment of every row to a column of its own with the least total cost, rows <= columns: the Hungarian method with
// potentials, one shortest augmenting path per row (R. Jonker, A. Volgenant, Computing 38, 1987). Index 0 is a dummy.
std::vector<int64_t> assign(const std::vector<double>& cost, int64_t rows, int64_t columns) {
  std::vector<double> row_potential(rows + 1, 0.0), potential(columns + 1, 0.0), distance(columns + 1);
  std::vector<int64_t> row_of(columns + 1, 0), previous(columns + 1, 0);
  std::vector<char> done(columns + 1);
  for (int64_t row = 1; row <= rows; ++row) {
    row_of[0] = row;
    std::fill(distance.begin(), distance.end(), kInfinity);
    std::fill(done.begin(), done.end(), 0);
    int64_t at = 0;
    do {
      done[at] = 1;
      const int64_t from = row_of[at];
      int64_t next = 0;
      double step = kInfinity;
      for (int64_t j = 1; j <= columns; ++j) {
        if (done[j]) continue;
        const double reduced = cost[(from - 1) * columns + j - 1] - row_potential[from] - potential[j];
        if (reduced < distance[j]) {
          distance[j] = reduced;
          previous[j] = at;
        }
        if (distance[j] < step) {
          step = distance[j];
          next = j;
        }
      }
      for (int64_t j = 0; j <= columns; ++j) {
        if (done[j]) {
          row_potential[row_of[j]] += step;
          potential[j] -= step;
        } else {
          distance[j] -= step;
        }
      }
      at = next;
    } while (row_of[at] != 0);
    while (at != 0) {
      row_of[at] = row_of[previous[at]];
      at = previous[at];
    }
  }
  std::vector<int64_t> column_of(rows, -1);
  for (int64_t j = 1; j <= columns; ++j) {
    if (row_of[j]) column_of[row_of[j] - 1] = j - 1;
  }
  return column_of;
}

struct Person {
  std::vector<int64_t> cells;  // [keypoints], -1 where there is none
  std::vector<float> values;   // [keypoints]
  std::vector<double> tag_sum;
  int64_t count = 0;
};

class Grouping {
 public:
  Grouping(const TagMaps& maps, const GroupingOptions& options) : maps_(maps), options_(options) {
    for (int64_t k = 0; k < maps.keypoints; ++k) {
      tiles_.push_back(tile_ranges(maps.heatmaps + k * cells(), tiling()));
    }
  }

  // Gives the candidates of a keypoint to the people so far, or makes them new people.
  void add_keypoint(int64_t keypoint) {
    const std::vector<Candidate> found = find_candidates(maps_, keypoint, tiles_[keypoint], options_);
    const int64_t n = found.size(), m = people_.size();
    if (n == 0) return;
    std::vector<int64_t> person_of(n, -1);
    if (m > 0) {
      const bool turned = n > m;  // assign() wants rows <= columns
      std::vector<double> cost(n * m), distances(n * m);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < m; ++j) {
          const double d = tag_distance(people_[j], keypoint, found[i].cell);
          distances[i * m + j] = d;
          const double close = std::min(d / options_.tag_threshold, 1.0);
          cost[turned ? j * n + i : i * m + j] =
              std::nearbyint(d) * 100.0 - double(found[i].value) + kTieBreak * (close * close);
        }
      }
      if (turned) {
        const std::vector<int64_t> candidate_of = assign(cost, m, n);
        for (int64_t j = 0; j < m; ++j) person_of[candidate_of[j]] = j;
      } else {
        person_of = assign(cost, n, m);
      }
      for (int64_t i = 0; i < n; ++i) {
        if (person_of[i] >= 0 && !(distances[i * m + person_of[i]] < options_.tag_threshold)) person_of[i] = -1;
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      if (person_of[i] < 0) {
        person_of[i] = people_.size();
        people_.push_back({std::vector<int64_t>(maps_.keypoints, -1), std::vector<float>(maps_.keypoints, 0.0f),
                           std::vector<double>(maps_.dims, 0.0)});
      }
      Person& person = people_[person_of[i]];
      person.cells[keypoint] = found[i].cell;
      person.values[keypoint] = found[i].value;
      for (int64_t d = 0; d < maps_.dims; ++d) person.tag_sum[d] += tag(d, keypoint)[found[i].cell];
      ++person.count;
    }
  }

  People result() {
    std::vector<float> scores;
    for (const Person& person : people_) {
      const double sum = std::accumulate(person.values.begin(), person.values.end(), 0.0);
      scores.push_back(float(sum / double(maps_.keypoints)));
    }
    std::vector<int64_t> kept(people_.size());
    std::iota(kept.begin(), kept.end(), 0);
    if (int64_t(kept.size()) > options_.max_people) {
      std::stable_sort(kept.begin(), kept.end(), [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
      kept.resize(options_.max_people);
      std::sort(kept.begin(), kept.end());
    }
    People out;
    out.keypoints.assign(kept.size() * maps_.keypoints * 3, 0.0f);
    for (int64_t i : kept) out.scores.push_back(scores[i]);
    for (int64_t k = 0; k < maps_.keypoints; ++k) {
      std::vector<std::vector<Range>> tag_tiles;  // filled when first needed
      for (size_t i = 0; i < kept.size(); ++i) {
        const Person& person = people_[kept[i]];
        int64_t cell = person.cells[k];
        if (cell < 0 && options_.refine) cell = find_missing(person, k, tag_tiles);
        if (cell >= 0) put(&out.keypoints[(i * maps_.keypoints + k) * 3], k, cell);
      }
    }
    return out;
  }

 private:
  int64_t cells() const { return maps_.height * maps_.width; }
  Tiling tiling() const { return {maps_.height, maps_.width}; }
  const float* heatmap(int64_t keypoint) const { return maps_.heatmaps + keypoint * cells(); }
  const float* tag(int64_t d, int64_t keypoint) const {
    return maps_.tags + (d * maps_.keypoints + keypoint) * cells();
  }

  double tag_distance(const Person& person, int64_t keypoint, int64_t cell) const {
    double sum = 0;
    for (int64_t d = 0; d < maps_.dims; ++d) {
      const double difference = double(tag(d, keypoint)[cell]) - person.tag_sum[d] / double(person.count);
      sum += difference * difference;
    }
    return std::min(std::sqrt(sum), kLargestDistance);
  }

  // The cell with the greatest value minus rounded tag distance, if the heatmap is above 0 there, else -1.
  int64_t find_missing(const Person& person, int64_t keypoint, std::vector<std::vector<Range>>& tag_tiles) const {
    const std::vector<Range>& tiles = tiles_[keypoint];
    if (tag_tiles.empty()) {
      for (int64_t d = 0; d < maps_.dims; ++d) tag_tiles.push_back(tile_ranges(tag(d, keypoint), tiling()));
    }
    std::vector<float> mean(maps_.dims), bound(tiles.size());
    for (int64_t d = 0; d < maps_.dims; ++d) mean[d] = float(person.tag_sum[d] / double(person.count));
    for (size_t tile = 0; tile < tiles.size(); ++tile) {
      float sum = 0;
      for (int64_t d = 0; d < maps_.dims; ++d) {
        const Range& range = tag_tiles[d][tile];
        const float outside = std::max({range.low - mean[d], mean[d] - range.high, 0.0f});
        sum += outside * outside;
      }
      // no distance in the tile rounds to less; the factor makes up for rounding errors
      bound[tile] = tiles[tile].high - std::max(std::sqrt(sum) * 0.9999f - 0.5f, 0.0f);
    }
    Best best;
    if (bound.empty()) return -1;
    const size_t first = std::max_element(bound.begin(), bound.end()) - bound.begin();
    search_tile(first, keypoint, mean, best);
    for (size_t tile = 0; tile < tiles.size(); ++tile) {
      if (bound[tile] >= best.value && tile != first) search_tile(tile, keypoint, mean, best);
    }
    return best.cell >= 0 && heatmap(keypoint)[best.cell] > 0 ? best.cell : -1;
  }

  struct Best {
    int64_t cell = -1;
    float value = -std::numeric_limits<float>::infinity();
  };

  // Single precision, as in the original.
  void search_tile(int64_t tile, int64_t keypoint, const std::vector<float>& mean, Best& best) const {
    const float* map = heatmap(keypoint);
    tiling().rows(tile, [&](int64_t first, int64_t row_count) {
      for (int64_t start = first; start < first + row_count; start += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, first + row_count - start);
        const Lanes value = load(map + start, count, -std::numeric_limits<float>::infinity());
        Lanes squared = {};
        for (int64_t d = 0; d < maps_.dims; ++d) {
          const Lanes difference = load(tag(d, keypoint) + start, count, 0.0f) - mean[d];
          squared += difference * difference;
        }
        // a cell can win only if its distance is at most its lead and a half
        const Lanes lead = value - best.value + 0.5f;
        if (!any((value >= best.value) & (squared <= lead * lead * 1.0001f))) continue;
        for (int j = 0; j < count; ++j) {
          if (!(value[j] >= best.value) || !std::isfinite(value[j])) continue;
          const float fit = value[j] - std::nearbyint(std::sqrt(squared[j]));
          const int64_t cell = start + j;
          if (fit > best.value || (fit == best.value && cell < best.cell)) best = {cell, fit};
        }
      }
    });
  }

  // Writes x, y and value: the centre of the cell, half a cell further, and a quarter towards the greater neighbour.
  void put(float* out, int64_t keypoint, int64_t cell) const {
    const float* map = heatmap(keypoint);
    const int64_t y = cell / maps_.width, x = cell % maps_.width;
    const auto at = [&](int64_t u, int64_t v) {
      return map[std::clamp<int64_t>(v, 0, maps_.height - 1) * maps_.width +
                 std::clamp<int64_t>(u, 0, maps_.width - 1)];
    };
    out[0] = float(x) + (at(x + 1, y) > at(x - 1, y) ? 0.75f : 0.25f);
    out[1] = float(y) + (at(x, y + 1) > at(x, y - 1) ? 0.75f : 0.25f);
    out[2] = map[cell];
  }

  const TagMaps& maps_;
  const GroupingOptions& options_;
  std::vector<std::vector<Range>> tiles_;  // [keypoints], of the heatmaps
  std::vector<Person> people_;
};

}  // namespace

People group_people(const TagMaps& maps, const int64_t* order, const GroupingOptions& options) {
  Grouping grouping(maps, options);
  for (int64_t i = 0; i < maps.keypoints; ++i) grouping.add_keypoint(order[i]);
  return grouping.result();
}

}  // namespace fastpose
