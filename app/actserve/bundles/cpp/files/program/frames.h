// The protocol of the program `policy`: frames on standard input and output. README.md describes them.
#pragma once

#include "actserve/policy.h"

namespace actserve {

// Memory that the program shares with its driver; the observations of a frame may be there.
struct Shared {
  const unsigned char* memory = nullptr;
  std::size_t bytes = 0;
};

// Maps a file. Throws std::system_error.
Shared map(const char* path);

// Where observation `index` of `count` items is in shared memory; signature::observation_count: where the last one ends.
std::size_t shared_offset(std::size_t index, std::size_t count);

// Answers the frames of the file descriptor `in` on `out` until the input ends: returns true, or false if it ended in
// the middle of a frame. `all_outputs`: answers have every output, not only the action. Throws std::system_error.
bool serve(Policy& policy, Episode& episode, int in, int out, bool all_outputs, Shared shared = {});

}  // namespace actserve
