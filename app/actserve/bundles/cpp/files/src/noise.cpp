#include "noise.h"

#include <cfloat>
#include <cmath>
#include <cstring>
#include <initializer_list>

#include "ziggurat.h"

namespace actserve {
namespace {

constexpr float kInverseTail = 0.273661237329758272f;  // 1 / normal_ziggurat.tail, before it is rounded

// The two halves of the product of 64-bit numbers.
struct Product {
  std::uint64_t high, low;
};

Product product(std::uint64_t a, std::uint64_t b) {
  const std::uint64_t a0 = a & 0xffffffff, a1 = a >> 32, b0 = b & 0xffffffff, b1 = b >> 32;
  const std::uint64_t lowest = a0 * b0, middle = a1 * b0 + (lowest >> 32), other = a0 * b1 + (middle & 0xffffffff);
  return {a1 * b1 + (middle >> 32) + (other >> 32), a * b};
}

// The logarithm of a positive number that is not subnormal, rounded as numpy does on processors with FMA: a quotient of
// two polynomials of degree 5 in the fraction.
float logarithm(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  float exponent = static_cast<float>(static_cast<int>(bits >> 23) - 126);
  const std::uint32_t fraction_bits = (bits & 0x7fffff) | 0x3f000000;  // 0.5 to 1
  float x;
  std::memcpy(&x, &fraction_bits, sizeof x);
  if (x <= 0.70710678118654752440f) {
    exponent -= 1;
    x += x;
  }
  x -= 1;
  float above = 2.589979117907922693523e-02f;
  for (const float factor : {3.808837741388407920751e-01f, 1.480000633576506585156e+00f, 2.112677543073053063722e+00f,
                             9.999999999999998702752e-01f, 0.0f}) {
    above = std::fma(above, x, factor);
  }
  float below = 5.875095403124574342950e-03f;
  for (const float factor : {1.546476374983906719538e-01f, 9.864942958519418960339e-01f, 2.453006071784736363091e+00f,
                             2.612677543073109236779e+00f, 1.0f}) {
    below = std::fma(below, x, factor);
  }
  return std::fma(exponent, 0.693147180559945309417232121458176568f, above / below);
}

}  // namespace

std::uint64_t Philox::next64() {
  if (used_ == 4) {
    std::uint64_t key0 = key_[0], key1 = key_[1];
    std::uint64_t (&x)[4] = block_;
    x[0] = ++counter_, x[1] = x[2] = x[3] = 0;
    for (int round = 0; round < 10; ++round) {
      const Product first = product(0xd2e7470ee14c6c93, x[0]), second = product(0xca5a826395121157, x[2]);
      const std::uint64_t mixed[4] = {second.high ^ x[1] ^ key0, second.low, first.high ^ x[3] ^ key1, first.low};
      std::memcpy(x, mixed, sizeof mixed);
      key0 += 0x9e3779b97f4a7c15, key1 += 0xbb67ae8584caa73b;
    }
    used_ = 0;
  }
  return block_[used_++];
}

std::uint32_t Philox::next32() {
  if (has_kept_) {
    has_kept_ = false;
    return kept_;
  }
  const std::uint64_t both = next64();
  kept_ = static_cast<std::uint32_t>(both >> 32);
  has_kept_ = true;
  return static_cast<std::uint32_t>(both);
}

float Philox::uniform() { return static_cast<float>(next32() >> 8) * 0x1p-24f; }

float Philox::between(const Ziggurat& ziggurat, std::uint32_t layer) {
  const float below = ziggurat.density[layer], above = ziggurat.density[layer - 1];
  return (above - below) * uniform() + below;
}

// The ziggurat method (Marsaglia and Tsang 2000).
float Philox::normal() {
  while (true) {
    const std::uint32_t bits = next32(), layer = bits & 0xff, position = bits >> 9 & 0x7fffff;
    float x = static_cast<float>(position) * normal_ziggurat.width[layer];
    if (bits >> 8 & 1) x = -x;
    if (position < normal_ziggurat.inside[layer]) return x;
    if (layer == 0) {
      while (true) {
        const float beyond = -kInverseTail * std::log1p(-uniform());
        const float y = -std::log1p(-uniform());
        if (y + y > beyond * beyond) {
          const float tail = normal_ziggurat.tail + beyond;
          return position >> 8 & 1 ? -tail : tail;
        }
      }
    }
    if (between(normal_ziggurat, layer) < std::exp(-0.5 * static_cast<double>(x) * static_cast<double>(x))) return x;
  }
}

float Philox::exponential() {
  while (true) {
    const std::uint32_t bits = next32() >> 1, layer = bits & 0xff, position = bits >> 8;
    const float x = static_cast<float>(position) * exponential_ziggurat.width[layer];
    if (position < exponential_ziggurat.inside[layer]) return x;
    if (layer == 0) return exponential_ziggurat.tail - std::log1p(-uniform());
    if (between(exponential_ziggurat, layer) < std::exp(static_cast<double>(-x))) return x;
  }
}

void Philox::fill(Distribution distribution, float* values, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    switch (distribution) {
      case Distribution::uniform:
        values[i] = uniform();
        break;
      case Distribution::normal:
        values[i] = normal();
        break;
      case Distribution::exponential:
      case Distribution::gumbel:
        values[i] = std::fmax(exponential(), FLT_MIN);
        if (distribution == Distribution::gumbel) values[i] = -logarithm(values[i]);
    }
  }
}

}  // namespace actserve
