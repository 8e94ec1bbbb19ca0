#include "validation.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

#include "actserve/policy.h"

namespace actserve {
namespace {

std::string text_of(double value) {
  char text[32];
  std::snprintf(text, sizeof text, std::trunc(value) == value && std::fabs(value) < 1e15 ? "%.0f" : "%g", value);
  return text;
}

// " at [2, 0]", the place in an item.
std::string place_of(const TensorSpec& spec, std::size_t element) {
  std::string text;
  for (std::size_t axis = spec.rank; axis-- > 0;) {
    const auto length = static_cast<std::size_t>(spec.shape[axis]);
    text = std::to_string(element % length) + (text.empty() ? "" : ", " + text);
    element /= length;
  }
  return " at [" + text + "]";
}

[[noreturn]] void refuse(const TensorSpec& spec, const std::string& expected, const std::string& got) {
  throw InvalidInput(std::string(spec.name) + ": expected " + expected + "; got " + got);
}

// `wrong` says whether a value is beyond a bound.
template <class T, class Wrong>
void check_bound(const TensorSpec& spec, const T* values, std::size_t count, Bound bound, const char* relation,
                 Wrong wrong) {
  if (bound.count == 0) return;
  const auto is_wrong = [&](std::size_t i) {
    return wrong(static_cast<double>(values[i]), bound.values[bound.count == 1 ? 0 : i % bound.count]);
  };
  bool any = false;
  if (bound.count == 1) {  // without a division
    for (std::size_t i = 0; i < count; ++i) any |= wrong(static_cast<double>(values[i]), bound.values[0]);
  } else {
    for (std::size_t i = 0; i < count; ++i) any |= is_wrong(i);
  }
  for (std::size_t i = 0; any && i < count; ++i) {
    if (!is_wrong(i)) continue;
    const std::size_t element = i % spec.elements;
    const std::string limit = bound.count == 1 ? text_of(bound.values[0])
                                               : text_of(bound.values[element]) + place_of(spec, element);
    refuse(spec, std::string("values of ") + relation + " " + limit, text_of(static_cast<double>(values[i])));
  }
}

template <class T>
void check(const TensorSpec& spec, const void* data, std::size_t items) {
  const auto* values = static_cast<const T*>(data);
  const std::size_t count = items * spec.elements;
  if (is_float(spec.dtype)) {
    bool nan = false;
    for (std::size_t i = 0; i < count; ++i) {
      const auto value = static_cast<double>(values[i]);
      nan |= value != value;
    }
    if (nan) refuse(spec, "numbers", "NaN");
  }
  check_bound(spec, values, count, spec.low, "at least", [](double value, double bound) { return value < bound; });
  check_bound(spec, values, count, spec.high, "at most", [](double value, double bound) { return value > bound; });
}

}  // namespace

void validate(const TensorSpec& spec, const void* data, std::size_t count) {
  if (spec.dtype == DType::boolean) {
    const auto* bytes = static_cast<const std::uint8_t*>(data);
    for (std::size_t i = 0; i < count * spec.elements; ++i) {
      if (bytes[i] > 1) refuse(spec, "bytes of 0 or 1 for bool", std::to_string(bytes[i]));
    }
  } else {
    dispatch(spec.dtype, [&](auto zero) { check<decltype(zero)>(spec, data, count); });
  }
}

}  // namespace actserve
