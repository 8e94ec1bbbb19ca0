#include "actserve/policy.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "bfloat16.h"
#include "files.h"
#include "noise.h"
#include "program.h"
#include "sha256.h"
#include "validation.h"

namespace actserve {
namespace {

using namespace signature;

Exploration choose(const Options& options) {
  const Exploration mode = options.exploration.value_or(explorations[0]);
  if (std::find(explorations.begin(), explorations.end(), mode) != explorations.end()) return mode;
  throw InvalidInput(mode == Exploration::random ? "exploration: expected deterministic; got random"
                                                 : "exploration: expected random; got deterministic");
}

void check_seed(std::uint64_t seed) {
  if (seed > kMaxSeed) throw InvalidInput("expected a seed of 0 to 2**63 - 1; got " + std::to_string(seed));
}

bool draws(Exploration mode) {
  return std::any_of(noises.begin(), noises.end(),
                     [&](const Noise& noise) { return noise.always || mode == Exploration::random; });
}

std::uint64_t random_seed() {
  std::random_device device;
  return (static_cast<std::uint64_t>(device()) << 32 | device()) & kMaxSeed;
}

}  // namespace

Policy::Policy(const std::string& folder, int threads)
    : program_(std::make_unique<Program>(folder + "/" + file.path, read_verified(folder, file), threads)),
      halves_(observation_count + output_count) {}

Policy::~Policy() = default;

void Policy::prepare(std::size_t count) {
  if (count < 1 || count > max_batch) {
    throw InvalidInput("expected 1 to " + std::to_string(max_batch) + " items; got " + std::to_string(count));
  }
  program_->resize(count);
  if (count == count_) return;
  for (std::size_t i = 0; i < observation_count; ++i) {
    if (inputs[i].dtype == DType::bfloat16) halves_[i].resize(count * inputs[i].elements);
  }
  for (std::size_t i = 0; i < output_count; ++i) {
    if (results[i].dtype == DType::bfloat16) halves_[observation_count + i].resize(count * results[i].elements);
  }
  count_ = count;
}

void* Policy::observation(std::size_t index) {
  void* memory = inputs[index].dtype == DType::bfloat16 ? halves_[index].data() : program_->input(index);
  given_[index] = memory;
  return memory;
}

void Policy::observe(std::size_t index, const void* memory) {
  given_[index] = memory;
  if (inputs[index].dtype != DType::bfloat16) program_->read_from(index, memory);
}

void Policy::observe(const Observations& observations) {
  const auto given = observations.pointers();
  for (std::size_t i = 0; i < observation_count; ++i) {
    if (given[i] == nullptr) {
      throw InvalidInput(std::string(inputs[i].name) + ": expected " + inputs[i].type + "; got nothing");
    }
    observe(i, given[i]);
  }
}

const void* Policy::output(std::size_t index) const {
  return results[index].dtype == DType::bfloat16 ? halves_[observation_count + index].data()
                                                 : program_->output(index);
}

Outputs Policy::act(const Observations& observations, std::size_t count, const Options& options) {
  prepare(count);
  observe(observations);
  return finish(options);
}

Outputs Policy::finish(const Options& options, Episode* episode, bool reset) {
  if (episode != nullptr && count_ != 1 && !states.empty()) {
    throw InvalidInput("expected one item, because the policy has state; got " + std::to_string(count_));
  }
  for (std::size_t i = 0; i < observation_count; ++i) {
    validate(inputs[i], given_[i], count_);
    if (inputs[i].dtype == DType::bfloat16) {
      widen(static_cast<const std::uint16_t*>(given_[i]), static_cast<float*>(program_->input(i)), halves_[i].size());
    }
  }
  complete(options, episode, reset);
  program_->run();
  for (std::size_t i = 0; i < output_count; ++i) {
    if (results[i].dtype == DType::bfloat16) {
      std::vector<std::uint16_t>& halves = halves_[observation_count + i];
      narrow(static_cast<const float*>(program_->output(i)), halves.data(), halves.size());
    }
  }
  if (episode != nullptr) {
    for (std::size_t i = 0; i < states.size(); ++i) {
      const TensorSpec& spec = results[states[i].output];
      auto* state = episode->state_[i].data();
      std::memcpy(state, program_->output(states[i].output), spec.program_bytes());
      if (spec.dtype == DType::bfloat16) round_to_halves(reinterpret_cast<float*>(state), spec.elements);
    }
    ++episode->steps_;
  }
  Outputs outputs;
  outputs.assign(*this);
  return outputs;
}

// Fills the inputs other than the observations.
void Policy::complete(const Options& options, const Episode* episode, bool reset) {
  const Exploration mode = choose(options);
  if (options.seed) check_seed(*options.seed);
  const bool fresh = reset || episode == nullptr || episode->steps_ == 0;
  for (std::size_t i = 0; i < states.size(); ++i) {
    const TensorSpec& spec = inputs[states[i].input];
    void* input = program_->input(states[i].input);
    if (fresh) {
      for (std::size_t item = 0; item < count_; ++item) {
        std::memcpy(static_cast<unsigned char*>(input) + item * spec.program_bytes(), states[i].initial,
                    spec.program_bytes());
      }
    } else {
      std::memcpy(input, episode->state_[i].data(), spec.program_bytes());
    }
  }
  if (is_init_input) {
    const bool first = reset || (fresh && !states.empty());
    std::memset(program_->input(*is_init_input), first, count_);
  }
  const auto parameters = options.parameters.values();
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    validate(inputs[first_parameter + i], &parameters[i], 1);
    std::fill_n(static_cast<float*>(program_->input(first_parameter + i)), count_, parameters[i]);
  }
  if (explore_input) std::memset(program_->input(*explore_input), mode == Exploration::random, count_);
  if (noises.empty()) return;
  if (!draws(mode)) {
    for (const Noise& noise : noises) {
      std::memset(program_->input(noise.input), 0, count_ * inputs[noise.input].program_bytes());
    }
  } else if (options.seed) {
    fill_noise(*options.seed);
  } else if (episode != nullptr && episode->seed_) {
    fill_noise(step_seed(*episode->seed_, episode->steps_ + 1));
  } else {
    fill_noise(random_seed());
  }
}

void Policy::fill_noise(std::uint64_t seed) {
  for (std::size_t item = 0; item < count_; ++item) {
    Philox generator(seed, item);
    for (const Noise& noise : noises) {
      const std::size_t elements = inputs[noise.input].elements;
      generator.fill(noise.distribution, static_cast<float*>(program_->input(noise.input)) + item * elements, elements);
    }
  }
}

Episode::Episode(Policy& policy, std::optional<std::uint64_t> seed) : policy_(policy), seed_(seed) {
  if (seed) check_seed(*seed);
  for (const State& state : states) state_.emplace_back(inputs[state.input].program_bytes());
}

Outputs Episode::act(const Observations& observations, const Options& options) {
  policy_.prepare(1);
  policy_.observe(observations);
  return policy_.finish(options, this);
}

void Episode::reset() { steps_ = 0; }

std::uint64_t step_seed(std::uint64_t seed, std::uint64_t step) {
  std::uint8_t bytes[16];
  for (int i = 0; i < 8; ++i) {
    bytes[i] = static_cast<std::uint8_t>(seed >> 8 * i);
    bytes[8 + i] = static_cast<std::uint8_t>(step >> 8 * i);
  }
  const auto digest = sha256(bytes, sizeof bytes);
  std::uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | digest[i];
  return value & kMaxSeed;
}

}  // namespace actserve
