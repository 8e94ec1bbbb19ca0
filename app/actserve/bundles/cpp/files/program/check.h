// Runs the golden samples: inputs and the outputs of the trained policy, and of the service.
#pragma once

#include <string>

#include "actserve/policy.h"

namespace actserve {

bool is_check(const std::string& name);

// The observations of the first sample, as a frame has them.
std::string first_observations(const std::string& folder);

// Runs the check of this name, or all of them if it is empty, and prints what came of it. Returns whether they agree.
// Throws Error.
bool check(Policy& policy, const std::string& folder, const std::string& name);

}  // namespace actserve
