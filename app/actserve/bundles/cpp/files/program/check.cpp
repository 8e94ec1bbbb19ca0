#include "check.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "bfloat16.h"
#include "files.h"
#include "golden.h"
#include "noise.h"
#include "program.h"

namespace actserve {
namespace {

using namespace signature;
using Bytes = std::string;

template <std::size_t N>
std::vector<Bytes> read_all(const std::string& folder, const File& file, const std::array<golden::Place, N>& places) {
  const std::string data = read_verified(folder, file);
  std::vector<Bytes> contents;
  for (const golden::Place& place : places) contents.push_back(data.substr(place.offset, place.bytes));
  return contents;
}

double number(DType dtype, const Bytes& bytes, std::size_t index) {
  return dispatch(in_program(dtype), [&](auto value) {
    std::memcpy(&value, bytes.data() + index * sizeof value, sizeof value);
    return static_cast<double>(value);
  });
}

// Compares a result of `items` items with the reference. Prints a difference beyond the tolerance.
bool agrees(std::size_t index, const Bytes& ours, const Bytes& reference, std::size_t items, const char* check) {
  const TensorSpec& spec = results[index];
  if (is_float(spec.dtype)) {
    double largest = 0;
    bool within = true;
    const double rounding = spec.dtype == DType::float16 ? 0x1p-9 : spec.dtype == DType::bfloat16 ? 0x1p-6 : 0;
    for (std::size_t i = 0; i < items * spec.elements; ++i) {
      const double a = number(spec.dtype, ours, i), b = number(spec.dtype, reference, i);
      const double difference = a == b ? 0 : std::fabs(a - b);
      const double allowed =
          std::max(golden::absolute, rounding) + std::max(golden::relative, rounding) * std::fabs(b);
      within &= difference == 0 || (std::isfinite(b) && difference <= allowed);
      if (!(difference <= largest)) largest = difference;
    }
    std::printf("%s: %s: largest difference %g%s\n", check, spec.name, largest, within ? "" : ", beyond the tolerance");
    return within;
  }
  const std::size_t width = size_of(spec.dtype) * (index == 0 ? spec.elements : 1);
  std::size_t differing = 0;
  for (std::size_t at = 0; at < reference.size(); at += width) differing += ours.compare(at, width, reference, at, width) != 0;
  std::printf("%s: %s: %zu of %zu differ\n", check, spec.name, differing, reference.size() / width);
  // At a limit, rounding decides whether `limited` says so.
  return differing <= (limited_result == index ? std::max<std::size_t>(1, items / 50) : 0);
}

bool all_agree(const std::vector<Bytes>& ours, const std::vector<Bytes>& reference, std::size_t items, const char* check) {
  bool agreed = true;
  for (std::size_t i = 0; i < reference.size(); ++i) agreed &= agrees(i, ours[i], reference[i], items, check);
  return agreed;
}

// One item in the memory of the program, as callers give it.
Bytes as_given(const TensorSpec& spec, const char* item) {
  if (spec.dtype != DType::bfloat16) return Bytes(item, spec.bytes());
  std::vector<float> wide(spec.elements);
  std::memcpy(wide.data(), item, spec.program_bytes());
  std::vector<std::uint16_t> halves(spec.elements);
  narrow(wide.data(), halves.data(), halves.size());
  return Bytes(reinterpret_cast<const char*>(halves.data()), spec.bytes());
}

Bytes result_of(Program& program, std::size_t index, std::size_t count) {
  const TensorSpec& spec = results[index];
  Bytes bytes(static_cast<const char*>(program.output(index)), count * spec.program_bytes());
  if (spec.dtype == DType::bfloat16) round_to_halves(reinterpret_cast<float*>(&bytes[0]), count * spec.elements);
  return bytes;
}

// Every input of the program is the sample's, noise and state too.
bool check_samples(Policy& policy, const std::string& folder, std::size_t size, const char* name) {
  const auto samples = read_all(folder, golden::file, golden::inputs);
  std::vector<Bytes> ours(results.size());
  for (std::size_t start = 0; start < golden::items; start += size) {
    const std::size_t count = std::min(size, golden::items - start);
    policy.prepare(count);
    Program& program = policy.program();
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const std::size_t bytes = inputs[i].program_bytes();
      std::memcpy(program.input(i), samples[i].data() + start * bytes, count * bytes);
    }
    program.run();
    for (std::size_t i = 0; i < results.size(); ++i) ours[i] += result_of(program, i, count);
  }
  return all_agree(ours, read_all(folder, golden::file, golden::outputs), golden::items, name);
}

// The noise of some seeds is that of the service, bit for bit.
bool check_noise(const std::string& folder) {
  const auto reference = read_all(folder, golden::own_file, golden::noise);
  std::vector<Bytes> ours(noises.size());
  for (const auto& [seed, step] : golden::seeds) {
    Philox generator(step_seed(seed, step), 1);
    for (std::size_t i = 0; i < noises.size(); ++i) {
      std::vector<float> drawn(golden::draws * inputs[noises[i].input].elements);
      generator.fill(noises[i].distribution, drawn.data(), drawn.size());
      ours[i].append(reinterpret_cast<const char*>(drawn.data()), drawn.size() * sizeof(float));
    }
  }
  for (std::size_t i = 0; i < noises.size(); ++i) {
    const bool same = ours[i] == reference[i];
    std::printf("noise: %s: %s\n", inputs[noises[i].input].name, same ? "the same" : "differs");
    if (!same) return false;
  }
  return true;
}

// Steps of an episode, with state, a reset and a seed, as the service takes them.
bool check_episode(Policy& policy, const std::string& folder) {
  const auto samples = read_all(folder, golden::file, golden::inputs);
  const auto reference = read_all(folder, golden::own_file, golden::episode);
  std::vector<Bytes> ours(output_count);
  Episode episode(policy, golden::episode_seed);
  Options options;
  options.exploration = explorations.back();
  for (std::size_t step = 0; step < golden::episode_steps; ++step) {
    policy.prepare(1);
    for (std::size_t i = 0; i < observation_count; ++i) {
      const Bytes item = as_given(inputs[i], samples[i].data() + step * inputs[i].program_bytes());
      std::memcpy(policy.observation(i), item.data(), item.size());
    }
    policy.finish(options, &episode, step == golden::episode_reset);
    for (std::size_t i = 0; i < output_count; ++i) ours[i] += result_of(policy.program(), i, 1);
  }
  return all_agree(ours, reference, golden::episode_steps, "episode");
}

}  // namespace

bool is_check(const std::string& name) {
  return name == "single" || name == "batched" || name == "noise" || name == "episode";
}

std::string first_observations(const std::string& folder) {
  const auto samples = read_all(folder, golden::file, golden::inputs);
  std::string item;
  for (std::size_t i = 0; i < observation_count; ++i) item += as_given(inputs[i], samples[i].data());
  return item;
}

bool check(Policy& policy, const std::string& folder, const std::string& name) {
  std::printf("built with: %s\n", Program::version().c_str());
  const auto wanted = [&](const char* one) { return name.empty() || name == one; };
  bool agreed = true;
  if (wanted("single")) agreed &= check_samples(policy, folder, 1, "single");
  if (wanted("batched")) agreed &= check_samples(policy, folder, std::min<std::size_t>(8, max_batch), "batched");
  if (wanted("noise")) agreed &= check_noise(folder);
  if (wanted("episode") && golden::episode_steps > 0) agreed &= check_episode(policy, folder);
  return agreed;
}

}  // namespace actserve
