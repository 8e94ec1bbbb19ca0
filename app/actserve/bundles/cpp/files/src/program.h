// The program of the policy, in one of two runtimes: onnx_program.cpp or pt2_program.cpp is built, never both.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace actserve {

class Program {
 public:
  // The runtime and its version: "onnxruntime 1.31.1".
  static std::string version();

  // `data` is the content of the file `path`. Throws Error.
  Program(const std::string& path, const std::string& data, int threads);
  ~Program();

  // The number of items of the next runs. What the inputs hold is lost if it changes.
  void resize(std::size_t count);

  // The program's own memory for input `index` of the signature, from which the next runs read: count items of its
  // dtype in the program, row-major.
  void* input(std::size_t index);

  // The next runs read input `index` from other memory, which they do not change.
  void read_from(std::size_t index, const void* memory);

  // One inference call. Throws Error.
  void run();

  // Result `index` of the last run, as `input`.
  const void* output(std::size_t index) const;

 private:
  struct Runtime;
  std::unique_ptr<Runtime> runtime_;
};

}  // namespace actserve
