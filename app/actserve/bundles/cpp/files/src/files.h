// Reads the files of the bundle.
#pragma once

#include <string>

#include "actserve/spec.h"

namespace actserve {

// The content of a file, after its size and its SHA-256 were checked. Throws Error.
std::string read_verified(const std::string& folder, const File& file);

}  // namespace actserve
