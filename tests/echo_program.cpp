// A program for tests of the library without a runtime: its results are its inputs, and each state plus one.

#include <cstdio>
#include <cstring>
#include <type_traits>
#include <vector>

#include "actserve/policy.h"
#include "frames.h"
#include "program.h"

namespace actserve {

using namespace signature;

struct Program::Runtime {
  std::vector<std::vector<unsigned char>> own, outputs;
  std::vector<const void*> read;
  std::size_t count = 0;
};

std::string Program::version() { return "echo 1"; }

Program::Program(const std::string&, const std::string&, int) : runtime_(new Runtime) {}

Program::~Program() = default;

void Program::resize(std::size_t count) {
  runtime_->count = count;
  runtime_->own.clear();
  runtime_->outputs.clear();
  for (const TensorSpec& spec : inputs) runtime_->own.emplace_back(count * spec.program_bytes() + 1);
  for (const TensorSpec& spec : results) runtime_->outputs.emplace_back(count * spec.program_bytes() + 1);
  runtime_->read.assign(inputs.size(), nullptr);
}

void* Program::input(std::size_t index) {
  runtime_->read[index] = runtime_->own[index].data();
  return runtime_->own[index].data();
}

void Program::read_from(std::size_t index, const void* memory) { runtime_->read[index] = memory; }

void Program::run() {
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    std::memcpy(runtime_->outputs[i].data(), runtime_->read[i], runtime_->count * inputs[i].program_bytes());
  }
  for (const State& state : states) {
    const TensorSpec& spec = inputs[state.input];
    unsigned char* next = runtime_->outputs[state.output].data();
    dispatch(in_program(spec.dtype), [&](auto value) {
      for (std::size_t i = 0; i < runtime_->count * spec.elements; ++i) {
        std::memcpy(&value, static_cast<const unsigned char*>(runtime_->read[state.input]) + i * sizeof value, sizeof value);
        if constexpr (std::is_arithmetic_v<decltype(value)>) value += 1;
        std::memcpy(next + i * sizeof value, &value, sizeof value);
      }
    });
  }
}

const void* Program::output(std::size_t index) const { return runtime_->outputs[index].data(); }

}  // namespace actserve

// The ages of two episodes that take steps by turns, and of one of them after a reset.
static int take_turns(actserve::Policy& policy) {
  actserve::Episode first(policy), second(policy);
  const auto step = [&](actserve::Episode& episode) {
    policy.prepare(1);
    for (std::size_t i = 0; i < actserve::signature::observation_count; ++i) {
      std::memset(policy.observation(i), 0, actserve::signature::inputs[i].bytes());
    }
    std::printf("%d ", static_cast<int>(*policy.finish({}, &episode).age));
  };
  for (actserve::Episode* episode : {&first, &second, &first, &first, &second}) step(*episode);
  first.reset();
  step(first);
  step(second);
  return 0;
}

int main(int count, char** arguments) {
  actserve::Policy policy(arguments[count - 1]);
  if (std::strcmp(arguments[1], "--turns") == 0) return take_turns(policy);
  actserve::Episode episode(policy, 7);
  return actserve::serve(policy, episode, 0, 1, true) ? 0 : 1;
}
