// A trained policy. See README.md for an example.
//
// A Policy and its Episodes belong to one thread at a time. All functions throw Error.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "actserve/signature.h"

namespace actserve {

// The bundle cannot be loaded, or the program failed.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The caller's input is wrong; the message says what was expected and what came. Nothing has changed.
struct InvalidInput : Error {
  using Error::Error;
};

// How to act. By default: the policy's first exploration mode, and the parameters of the training.
struct Options {
  std::optional<Exploration> exploration;
  std::optional<std::uint64_t> seed;  // of the noise, 0 to 2^63 - 1; none: a random one
  Parameters parameters;              // of all items
};

class Program;
class Episode;

class Policy {
 public:
  // Loads the program from the folder of the bundle, and checks its SHA-256. A call of it takes so many `threads`.
  explicit Policy(const std::string& folder, int threads = 1);
  ~Policy();
  Policy(const Policy&) = delete;
  Policy& operator=(const Policy&) = delete;

  // Acts on `count` items, 1 to signature::max_batch. If the policy has state, each is the first step of an episode.
  // The program reads the observations where they are. The outputs are valid until the policy is used again.
  Outputs act(const Observations& observations, std::size_t count = 1, const Options& options = {});

  // The same in parts, for callers that write observations into the memory of the program:
  // `prepare`, fill each `observation`, and `finish`. `reset`: the state begins anew, as by is_init on a stream of the
  // service; the steps are counted on.
  void prepare(std::size_t count);
  void* observation(std::size_t index);
  void observe(std::size_t index, const void* memory);  // or: the observation is in other memory
  Outputs finish(const Options& options = {}, Episode* episode = nullptr, bool reset = false);
  const void* output(std::size_t index) const;  // of signature::outputs, of the last step

  // The program as it is, without validation and without noise.
  Program& program() { return *program_; }

 private:
  void complete(const Options& options, const Episode* episode, bool reset);
  void fill_noise(std::uint64_t seed);
  friend class Episode;
  void observe(const Observations& observations);

  std::unique_ptr<Program> program_;
  std::size_t count_ = 0;
  std::array<const void*, signature::observation_count> given_{};
  std::vector<std::vector<std::uint16_t>> halves_;  // of observations and outputs that are bfloat16
};

// One run of an environment, one item a step. It keeps the state of the policy between two steps. A policy can have
// many episodes.
class Episode {
 public:
  // With a seed, step k of the episode draws its noise from step_seed(seed, k), as a session of the service does.
  explicit Episode(Policy& policy, std::optional<std::uint64_t> seed = std::nullopt);

  // One step. If it throws, the episode has not changed.
  Outputs act(const Observations& observations, const Options& options = {});

  // Begins again: the next step is the first one.
  void reset();

  std::uint64_t steps() const { return steps_; }

 private:
  friend class Policy;

  Policy& policy_;
  std::optional<std::uint64_t> seed_;
  std::uint64_t steps_ = 0;
  std::vector<std::vector<unsigned char>> state_;
};

// The seed of the noise of one step (counted from 1) of an episode with `seed`.
std::uint64_t step_seed(std::uint64_t seed, std::uint64_t step);

}  // namespace actserve
