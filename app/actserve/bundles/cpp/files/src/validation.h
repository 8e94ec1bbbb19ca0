// The checks of the service on the values of observations and parameters.
#pragma once

#include <cstddef>

#include "actserve/spec.h"

namespace actserve {

// Throws InvalidInput for NaN, for values out of bounds, and for booleans other than 0 and 1. `data` holds `count` items
// of the dtype of `spec`.
void validate(const TensorSpec& spec, const void* data, std::size_t count);

}  // namespace actserve
