// Runs a .onnx program with ONNX Runtime's C interface, on the CPU.

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "actserve/policy.h"
#include "program.h"

#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#elif __has_include(<onnxruntime/core/session/onnxruntime_c_api.h>)
#include <onnxruntime/core/session/onnxruntime_c_api.h>
#else
#include "onnx_abi.h"
#endif

namespace actserve {
namespace {

constexpr std::uint32_t kVersion = 8;  // of the interface; libraries also have the earlier versions
constexpr std::size_t kInputs = signature::inputs.size(), kOutputs = signature::results.size();

const OrtApi& api() {
  static const OrtApi* const found = OrtGetApiBase()->GetApi(kVersion);
  if (found == nullptr) {
    throw Error(std::string("expected ONNX Runtime 1.8 or later; got ") + OrtGetApiBase()->GetVersionString());
  }
  return *found;
}

void check(OrtStatus* status) {
  if (status == nullptr) return;
  const Error error(std::string("ONNX Runtime failed: ") + api().GetErrorMessage(status));
  api().ReleaseStatus(status);
  throw error;
}

// An object of ONNX Runtime, which the function releases.
template <class T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

constexpr ONNXTensorElementDataType kTypes[] = {  // of the program's tensors, in the order of DType
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8,    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,   ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL};

// A tensor in memory that is not ONNX Runtime's.
Owned<OrtValue> tensor(const TensorSpec& spec, std::size_t count, void* memory, const OrtMemoryInfo* where) {
  std::vector<std::int64_t> shape(spec.shape, spec.shape + spec.rank);
  shape.insert(shape.begin(), static_cast<std::int64_t>(count));
  OrtValue* value = nullptr;
  check(api().CreateTensorWithDataAsOrtValue(where, memory, count * spec.program_bytes(), shape.data(), shape.size(),
                                             kTypes[static_cast<int>(spec.dtype)], &value));
  return Owned<OrtValue>(value, api().ReleaseValue);
}

constexpr std::align_val_t kAlignment{64};  // of a cache line

struct Free {
  void operator()(unsigned char* memory) const { operator delete(memory, kAlignment); }
};

// One input or output.
struct Port {
  Port(const TensorSpec& its_spec, std::size_t count, const OrtMemoryInfo* where)
      : spec(&its_spec),
        memory(static_cast<unsigned char*>(operator new(count * its_spec.program_bytes() + 1, kAlignment))),
        bound(memory.get()),
        value(tensor(its_spec, count, memory.get(), where)) {}

  const TensorSpec* spec;
  std::unique_ptr<unsigned char, Free> memory;
  void* bound;  // the memory of `value`
  Owned<OrtValue> value;
};

}  // namespace

struct Program::Runtime {
  Owned<OrtEnv> environment{nullptr, api().ReleaseEnv};
  Owned<OrtMemoryInfo> where{nullptr, api().ReleaseMemoryInfo};
  Owned<OrtSession> session{nullptr, api().ReleaseSession};
  std::vector<Port> inputs, outputs;
  std::array<const OrtValue*, kInputs> input_values{};
  std::array<OrtValue*, kOutputs> output_values{};
  std::size_t count = 0;
};

std::string Program::version() { return std::string("onnxruntime ") + OrtGetApiBase()->GetVersionString(); }

Program::Program(const std::string&, const std::string& data, int threads) : runtime_(std::make_unique<Runtime>()) {
  ::setenv("ORT_DISABLE_TELEMETRY", "1", 0);  // otherwise ONNX Runtime keeps a database in the user's home
  OrtEnv* environment = nullptr;
  check(api().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "actserve", &environment));
  runtime_->environment.reset(environment);
  OrtMemoryInfo* where = nullptr;
  check(api().CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &where));
  runtime_->where.reset(where);
  OrtSessionOptions* made_options = nullptr;
  check(api().CreateSessionOptions(&made_options));
  const Owned<OrtSessionOptions> options(made_options, api().ReleaseSessionOptions);
  check(api().SetIntraOpNumThreads(options.get(), threads));
  check(api().SetInterOpNumThreads(options.get(), 1));
  // Threads sleep between calls.
  check(api().AddSessionConfigEntry(options.get(), "session.intra_op.allow_spinning", "0"));
  check(api().AddSessionConfigEntry(options.get(), "session.load_model_format", "ONNX"));
  OrtSession* session = nullptr;
  check(api().CreateSessionFromArray(runtime_->environment.get(), data.data(), data.size(), options.get(), &session));
  runtime_->session.reset(session);
}

Program::~Program() = default;

void Program::resize(std::size_t count) {
  if (count == runtime_->count) return;
  std::vector<Port> inputs, outputs;
  for (const TensorSpec& spec : signature::inputs) inputs.emplace_back(spec, count, runtime_->where.get());
  for (const TensorSpec& spec : signature::results) outputs.emplace_back(spec, count, runtime_->where.get());
  for (std::size_t i = 0; i < kInputs; ++i) runtime_->input_values[i] = inputs[i].value.get();
  for (std::size_t i = 0; i < kOutputs; ++i) runtime_->output_values[i] = outputs[i].value.get();
  runtime_->inputs = std::move(inputs);
  runtime_->outputs = std::move(outputs);
  runtime_->count = count;
}

void* Program::input(std::size_t index) {
  unsigned char* memory = runtime_->inputs[index].memory.get();
  read_from(index, memory);
  return memory;
}

void Program::read_from(std::size_t index, const void* memory) {
  Port& port = runtime_->inputs[index];
  if (port.bound == memory) return;
  port.bound = const_cast<void*>(memory);
  port.value = tensor(*port.spec, runtime_->count, port.bound, runtime_->where.get());
  runtime_->input_values[index] = port.value.get();
}

void Program::run() {
  check(api().Run(runtime_->session.get(), nullptr, signature::input_names.data(), runtime_->input_values.data(),
                  kInputs, signature::result_names.data(), kOutputs, runtime_->output_values.data()));
}

const void* Program::output(std::size_t index) const { return runtime_->outputs[index].memory.get(); }

}  // namespace actserve
