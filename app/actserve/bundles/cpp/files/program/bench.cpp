#include "bench.h"

#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "check.h"
#include "frames.h"
#include "program.h"

namespace actserve {
namespace {

using namespace signature;

double thread_us() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) * 1e6 + static_cast<double>(time.tv_nsec) / 1e3;
}

void transfer(ssize_t (*call)(int, void*, std::size_t), int descriptor, char* data, std::size_t bytes) {
  for (std::size_t done = 0; done < bytes;) {
    const ssize_t part = call(descriptor, data + done, bytes - done);
    if (part <= 0) throw std::runtime_error("a pipe broke");
    done += static_cast<std::size_t>(part);
  }
}

// Another thread writes a request, waits for its answer, and so on.
void drive(int to, int from, std::string frame, std::size_t actions) {
  std::string answer(5 + results[0].bytes(), '\0');
  for (std::size_t i = 0; i < actions; ++i) {
    transfer([](int d, void* p, std::size_t n) { return ::write(d, p, n); }, to, &frame[0], frame.size());
    transfer([](int d, void* p, std::size_t n) { return ::read(d, p, n); }, from, &answer[0], answer.size());
  }
  ::close(to);
}

std::string framed(char flags, const std::string& rest) {
  const auto bytes = static_cast<std::uint32_t>(1 + rest.size());
  return std::string(reinterpret_cast<const char*>(&bytes), sizeof bytes) + flags + rest;
}

void served(Policy& policy, const std::string& frame, std::size_t actions, Shared shared) {
  int request[2], answer[2];
  if (::pipe(request) != 0 || ::pipe(answer) != 0) throw std::runtime_error("cannot make a pipe");
  std::thread driver(drive, request[1], answer[0], frame, actions);
  Episode episode(policy);
  serve(policy, episode, request[0], answer[1], false, shared);
  driver.join();
  for (const int descriptor : {request[0], answer[0], answer[1]}) ::close(descriptor);
}

}  // namespace

void bench(Policy& policy, const std::string& folder, std::size_t actions) {
  const std::string item = first_observations(folder);
  std::string memory(shared_offset(observation_count, 1), '\0');
  const char* next = item.data();
  for (std::size_t i = 0; i < observation_count; next += inputs[i++].bytes()) {
    std::memcpy(&memory[shared_offset(i, 1)], next, inputs[i].bytes());
  }
  const Shared shared{reinterpret_cast<const unsigned char*>(memory.data()), memory.size()};
  const std::string through_pipes = framed(0, item), through_memory = framed(32, "");
  Episode episode(policy);
  policy.prepare(1);
  const std::pair<const char*, std::function<void(std::size_t)>> ways[] = {
      {"the program alone", [&](std::size_t count) { for (; count > 0; --count) policy.program().run(); }},
      {"the library",
       [&](std::size_t count) {
         for (; count > 0; --count) {
           for (std::size_t i = 0; i < observation_count; ++i) policy.observe(i, shared.memory + shared_offset(i, 1));
           policy.finish({}, &episode);
         }
       }},
      {"`policy`, shared memory", [&](std::size_t count) { served(policy, through_memory, count, shared); }},
      {"`policy`, pipes", [&](std::size_t count) { served(policy, through_pipes, count, {}); }},
  };
  constexpr std::size_t kRounds = 10;
  const std::size_t count = std::max<std::size_t>(1, actions / kRounds);
  double times[4] = {};
  for (std::size_t round = 0; round <= kRounds; ++round) {  // by turns; the first round is not counted
    for (std::size_t way = 0; way < 4; ++way) {
      const double start = thread_us();
      ways[way].second(count);
      if (round > 0) times[way] += (thread_us() - start) / static_cast<double>(count * kRounds);
    }
  }
  std::puts("processor time of an action");
  for (std::size_t way = 0; way < 4; ++way) {
    std::printf("  %-24s %9.1f us  %.3f x\n", ways[way].first, times[way], times[way] / times[0]);
  }
}

}  // namespace actserve
