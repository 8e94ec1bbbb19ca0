// SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace actserve {

std::array<std::uint8_t, 32> sha256(const void* data, std::size_t bytes);

std::string hexadecimal(const std::array<std::uint8_t, 32>& digest);

}  // namespace actserve
