// The random numbers of the service: numpy's Generator(Philox(key=[seed, item])), in float32.
#pragma once

#include <cstddef>
#include <cstdint>

#include "actserve/spec.h"

namespace actserve {

constexpr std::uint64_t kMaxSeed = INT64_MAX;

struct Ziggurat;

// Philox 4x64 with 10 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
class Philox {
 public:
  Philox(std::uint64_t seed, std::uint64_t item) : key_{seed, item} {}

  void fill(Distribution distribution, float* values, std::size_t count);

 private:
  std::uint64_t next64();
  std::uint32_t next32();
  float uniform();  // [0, 1)
  float normal();
  float exponential();
  float between(const Ziggurat& ziggurat, std::uint32_t layer);  // a density between those of its edges

  std::uint64_t key_[2];
  std::uint64_t counter_ = 0;
  std::uint64_t block_[4] = {};
  int used_ = 4;  // numbers of the block
  std::uint32_t kept_ = 0;  // the upper half of a number, if it has not been used
  bool has_kept_ = false;
};

}  // namespace actserve
