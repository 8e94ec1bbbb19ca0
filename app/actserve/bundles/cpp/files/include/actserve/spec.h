// The words in which signature.h describes a policy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace actserve {

enum class DType { uint8, int8, uint16, int16, int32, int64, float16, bfloat16, float32, float64, boolean };

// The dtype of a tensor in the program's memory: programs take and give bfloat16 as float32.
constexpr DType in_program(DType dtype) { return dtype == DType::bfloat16 ? DType::float32 : dtype; }

constexpr bool is_float(DType dtype) {
  return dtype == DType::float16 || dtype == DType::bfloat16 || dtype == DType::float32 || dtype == DType::float64;
}

// An IEEE 754 number of 16 bits.
struct float16 {
  std::uint16_t bits;
  operator float() const {
    const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, fraction = bits & 0x3ffu;
    if (exponent == 0) {  // zero, or smaller than the normal numbers
      const float value = static_cast<float>(fraction) * 0x1p-24f;
      return sign ? -value : value;
    }
    const std::uint32_t wide = sign | (exponent == 31 ? 0xffu : exponent + 112) << 23 | fraction << 13;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

// The upper half of a float.
struct bfloat16 {
  std::uint16_t bits;
  operator float() const {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};

// Calls `function` with a zero of the C++ type of a dtype.
template <class Function>
constexpr auto dispatch(DType dtype, Function function) {
  switch (dtype) {
    case DType::uint8:
      return function(std::uint8_t{});
    case DType::int8:
      return function(std::int8_t{});
    case DType::uint16:
      return function(std::uint16_t{});
    case DType::int16:
      return function(std::int16_t{});
    case DType::int32:
      return function(std::int32_t{});
    case DType::int64:
      return function(std::int64_t{});
    case DType::float16:
      return function(float16{});
    case DType::bfloat16:
      return function(bfloat16{});
    case DType::float32:
      return function(float{});
    case DType::float64:
      return function(double{});
    default:
      return function(bool{});
  }
}

constexpr std::size_t size_of(DType dtype) {
  return dispatch(dtype, [](auto zero) { return sizeof zero; });
}

// An inclusive bound of values. `count` is 0 for none, 1 for one that holds for every element; otherwise each element of
// an item has its own.
struct Bound {
  const double* values;
  std::size_t count;
};

// One named tensor. Its shape is that of one item: the batch axis is no part of it.
struct TensorSpec {
  const char* name;
  DType dtype;
  const char* type;  // dtype and shape for people: "uint8[210, 160, 3]"
  const std::int64_t* shape;
  std::size_t rank;
  std::size_t elements;  // of one item
  Bound low, high;

  constexpr std::size_t bytes() const { return elements * size_of(dtype); }  // of one item
  constexpr std::size_t program_bytes() const { return elements * size_of(in_program(dtype)); }
};

// A recurrent tensor: output `output` of one step is input `input` of the next step.
struct State {
  std::size_t input;
  std::size_t output;
  const unsigned char* initial;  // the initial value of an item, as in the program's memory
};

enum class Distribution { uniform, normal, gumbel, exponential };

// A random input. `always`: it is drawn for deterministic actions, too.
struct Noise {
  std::size_t input;
  Distribution distribution;
  bool always;
};

enum class Exploration { deterministic, random };

// A file of the bundle, with its SHA-256 in hexadecimal digits.
struct File {
  const char* path;  // relative to the folder of the bundle
  const char* sha256;
  std::size_t bytes;
};

}  // namespace actserve
