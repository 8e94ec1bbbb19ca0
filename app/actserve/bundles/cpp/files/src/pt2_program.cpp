// Runs a .pt2 program, machine code that AOTInductor made, with the libraries of PyTorch.

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <torch/headeronly/version.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "actserve/policy.h"
#include "program.h"

namespace actserve {
namespace {

constexpr at::ScalarType kTypes[] = {  // of the program's tensors, in the order of DType
    at::kByte, at::kChar,  at::kUInt16, at::kShort,  at::kInt, at::kLong,
    at::kHalf, at::kFloat, at::kFloat,  at::kDouble, at::kBool};

at::ScalarType type_of(const TensorSpec& spec) { return kTypes[static_cast<int>(spec.dtype)]; }

std::vector<std::int64_t> shape_of(const TensorSpec& spec, std::size_t count) {
  std::vector<std::int64_t> shape(spec.shape, spec.shape + spec.rank);
  shape.insert(shape.begin(), static_cast<std::int64_t>(count));
  return shape;
}

// PyTorch's messages end with a stack trace.
std::string first_line(const std::exception& error) {
  const std::string message = error.what();
  return message.substr(0, message.find('\n'));
}

}  // namespace

struct Program::Runtime {
  torch::inductor::AOTIModelPackageLoader package;
  std::vector<at::Tensor> own, inputs, outputs;  // in the memory of the host; `inputs` may be the caller's
  std::size_t count = 0;
};

std::string Program::version() { return "torch " TORCH_VERSION; }

Program::Program(const std::string& path, const std::string&, int threads) {
  at::set_num_threads(threads);
  at::globalContext().setAllowTF32CuDNN(false);  // on CUDA devices, float32 would be rounded to 10 bits
  try {
    runtime_.reset(new Runtime{torch::inductor::AOTIModelPackageLoader(path), {}, {}, {}, 0});
  } catch (const std::exception& error) {
    throw Error("PyTorch cannot load the program: " + first_line(error));
  }
}

Program::~Program() = default;

void Program::resize(std::size_t count) {
  if (count == runtime_->count) return;
  const c10::InferenceMode guard;
  std::vector<at::Tensor> own;
  for (const TensorSpec& spec : signature::inputs) {
    own.push_back(at::empty(shape_of(spec, count), type_of(spec)));
  }
  runtime_->inputs = runtime_->own = std::move(own);
  runtime_->count = count;
}

void* Program::input(std::size_t index) {
  runtime_->inputs[index] = runtime_->own[index];
  return runtime_->own[index].data_ptr();
}

void Program::read_from(std::size_t index, const void* memory) {
  if (runtime_->inputs[index].const_data_ptr() == memory) return;
  const c10::InferenceMode guard;
  const TensorSpec& spec = signature::inputs[index];
  runtime_->inputs[index] = at::from_blob(const_cast<void*>(memory), shape_of(spec, runtime_->count), type_of(spec));
}

void Program::run() {
  const c10::InferenceMode guard;
  try {
    if constexpr (signature::on_cpu) {
      runtime_->outputs = runtime_->package.run(runtime_->inputs);
    } else {
      std::vector<at::Tensor> there;
      for (const at::Tensor& input : runtime_->inputs) there.push_back(input.to(at::Device(signature::device)));
      runtime_->outputs = runtime_->package.run(there);
    }
    for (at::Tensor& output : runtime_->outputs) {
      output = output.contiguous().cpu();
      for (const at::Tensor& input : runtime_->inputs) {  // one that comes back as it is, and is then overwritten
        if (output.storage().is_alias_of(input.storage())) output = output.clone();
      }
    }
  } catch (const std::exception& error) {
    throw Error("the program failed: " + first_line(error));
  }
  bool expected = runtime_->outputs.size() == signature::results.size();
  for (std::size_t i = 0; expected && i < signature::results.size(); ++i) {
    const TensorSpec& spec = signature::results[i];
    expected = runtime_->outputs[i].scalar_type() == type_of(spec) &&
               runtime_->outputs[i].sizes() == shape_of(spec, runtime_->count);
  }
  if (!expected) throw Error("the program's results are not those of the signature");
}

const void* Program::output(std::size_t index) const { return runtime_->outputs[index].const_data_ptr(); }

}  // namespace actserve
