#include "bfloat16.h"

#include <cmath>
#include <cstring>

#include "actserve/spec.h"

namespace actserve {
void widen(const std::uint16_t* halves, float* numbers, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) numbers[i] = bfloat16{halves[i]};
}

void narrow(const float* numbers, std::uint16_t* halves, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, numbers + i, sizeof bits);
    const std::uint32_t rounded = std::isnan(numbers[i]) ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    halves[i] = static_cast<std::uint16_t>(rounded);
  }
}

void round_to_halves(float* numbers, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    std::uint16_t half;
    narrow(numbers + i, &half, 1);
    numbers[i] = bfloat16{half};
  }
}

}  // namespace actserve
