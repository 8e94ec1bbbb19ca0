#pragma once

#include <string>

#include "actserve/policy.h"

namespace actserve {

// Prints the processor time of an action: of the program alone, of the library, and of `policy`, without its driver.
void bench(Policy& policy, const std::string& folder, std::size_t actions);

}  // namespace actserve
