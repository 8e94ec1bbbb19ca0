// The program `policy`: answers frames on standard input, or checks and measures the policy.

#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <optional>
#include <string>

#include "actserve/policy.h"
#include "bench.h"
#include "check.h"
#include "frames.h"

namespace {

using namespace actserve;

constexpr const char* kUsage =
    "policy [--folder DIR] [--threads N] [--seed N] [--outputs action|all] [--shared FILE]\n"
    "    answers frames on standard input with frames on standard output (README.md describes them)\n"
    "policy --check [single|batched|noise|episode]\n"
    "    runs the golden samples; exit code 1: a result differs\n"
    "policy --bench N\n"
    "    the processor time of N actions\n"
    "\n"
    "  --folder DIR     the folder of the bundle; by default the one of this program, or the one above it\n"
    "  --threads N      threads of an inference call; by default 1\n"
    "  --seed N         the seed of the episode: step k draws its noise from step_seed(N, k)\n"
    "  --outputs all    every output in an answer, not only the action\n"
    "  --shared FILE    a file whose memory has the observations of frames that say so\n";

[[noreturn]] void misused(const std::string& message) {
  std::fprintf(stderr, "policy: %s\n%s", message.c_str(), kUsage);
  std::exit(2);
}

std::uint64_t number(const std::string& option, const char* text) {
  char* end = nullptr;
  const std::uint64_t value = text != nullptr && *text >= '0' && *text <= '9' ? std::strtoull(text, &end, 10) : 0;
  if (end == nullptr || *end != '\0') misused(option + ": expected a whole number");
  return value;
}

// Where the file of the program is: beside this executable, or one folder above it, as after a build.
std::string default_folder(const char* called) {
  char path[4096];
  const ssize_t length = ::readlink("/proc/self/exe", path, sizeof path);
  const std::string executable = length > 0 ? std::string(path, static_cast<std::size_t>(length)) : called;
  const std::size_t slash = executable.rfind('/');
  const std::string beside = slash == std::string::npos ? "." : executable.substr(0, slash);
  return std::ifstream(beside + "/" + signature::file.path) ? beside : beside + "/..";
}

int run(int argc, char** argv) {
  std::string folder = default_folder(argv[0]), checked;
  std::optional<std::uint64_t> seed;
  std::size_t threads = 1, benched = 0;
  bool checks = false, all_outputs = false;
  Shared shared;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    const char* value = i + 1 < argc ? argv[i + 1] : nullptr;
    if (option == "--help") {
      std::fputs(kUsage, stdout);
      return 0;
    } else if (option == "--check") {
      checks = true;
      if (value != nullptr && value[0] != '-') checked = argv[++i];
      if (!checked.empty() && !is_check(checked)) misused("--check: expected single, batched, noise or episode");
    } else if (option == "--folder" && value != nullptr) {
      folder = argv[++i];
    } else if (option == "--shared" && value != nullptr) {
      shared = map(argv[++i]);
    } else if (option == "--threads") {
      threads = number(option, argv[++i]);
    } else if (option == "--seed") {
      seed = number(option, argv[++i]);
    } else if (option == "--bench") {
      benched = number(option, argv[++i]);
    } else if (option == "--outputs" && value != nullptr && (!std::strcmp(value, "all") || !std::strcmp(value, "action"))) {
      all_outputs = !std::strcmp(argv[++i], "all");
    } else {
      misused("cannot read " + option);
    }
  }
  Policy policy(folder, static_cast<int>(threads));
  if (checks) return check(policy, folder, checked) ? 0 : 1;
  if (benched > 0) {
    bench(policy, folder, benched);
    return 0;
  }
  std::signal(SIGPIPE, SIG_IGN);  // a closed output is an error of `write`
  Episode episode(policy, seed);
  if (serve(policy, episode, STDIN_FILENO, STDOUT_FILENO, all_outputs, shared)) return 0;
  std::fputs("policy: the input ended in the middle of a frame\n", stderr);
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "policy: %s\n", error.what());
    return 1;
  }
}
