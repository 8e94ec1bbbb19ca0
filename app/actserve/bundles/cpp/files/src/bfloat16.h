// bfloat16: programs have it as float, callers as the upper half of a float.
#pragma once

#include <cstddef>
#include <cstdint>

namespace actserve {

void widen(const std::uint16_t* halves, float* numbers, std::size_t count);
void narrow(const float* numbers, std::uint16_t* halves, std::size_t count);  // to the nearest, ties to even
void round_to_halves(float* numbers, std::size_t count);

}  // namespace actserve
