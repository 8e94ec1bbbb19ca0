// The part of ONNX Runtime's C interface that onnx_program.cpp uses, for hosts that have the library without its
// headers, such as the one in the Python package. Where there is onnxruntime_c_api.h, that is used.
//
// OrtApi is a table of functions. ONNX Runtime only ever appends to it, so that the places below hold for every version
// from 1.8 on.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _WIN32
#define ORT_API_CALL __stdcall
#else
#define ORT_API_CALL
#endif

extern "C" {

struct OrtEnv;
struct OrtMemoryInfo;
struct OrtRunOptions;
struct OrtSession;
struct OrtSessionOptions;
struct OrtStatus;
struct OrtValue;

enum OrtLoggingLevel { ORT_LOGGING_LEVEL_ERROR = 3 };
enum OrtAllocatorType { OrtDeviceAllocator = 0 };
enum OrtMemType { OrtMemTypeDefault = 0 };
enum ONNXTensorElementDataType {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 = 3,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16 = 4,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16 = 5,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL = 9,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE = 11,
};

using OrtUnused = void*;

struct OrtApi {
  OrtUnused places_0_to_1[2];
  const char*(ORT_API_CALL* GetErrorMessage)(const OrtStatus*);                          // 2
  OrtStatus*(ORT_API_CALL* CreateEnv)(OrtLoggingLevel, const char* name, OrtEnv**);      // 3
  OrtUnused places_4_to_7[4];
  OrtStatus*(ORT_API_CALL* CreateSessionFromArray)(const OrtEnv*, const void* model, std::size_t bytes,
                                                   const OrtSessionOptions*, OrtSession**);  // 8
  OrtStatus*(ORT_API_CALL* Run)(OrtSession*, const OrtRunOptions*, const char* const* input_names,
                                const OrtValue* const* inputs, std::size_t input_count,
                                const char* const* output_names, std::size_t output_count,
                                OrtValue** outputs);                                      // 9
  OrtStatus*(ORT_API_CALL* CreateSessionOptions)(OrtSessionOptions**);                    // 10
  OrtUnused places_11_to_23[13];
  OrtStatus*(ORT_API_CALL* SetIntraOpNumThreads)(OrtSessionOptions*, int);                // 24
  OrtStatus*(ORT_API_CALL* SetInterOpNumThreads)(OrtSessionOptions*, int);                // 25
  OrtUnused places_26_to_48[23];
  OrtStatus*(ORT_API_CALL* CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void* data, std::size_t bytes,
                                                           const std::int64_t* shape, std::size_t rank,
                                                           ONNXTensorElementDataType, OrtValue**);  // 49
  OrtUnused places_50_to_68[19];
  OrtStatus*(ORT_API_CALL* CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo**);  // 69
  OrtUnused places_70_to_91[22];
  void(ORT_API_CALL* ReleaseEnv)(OrtEnv*);                // 92
  void(ORT_API_CALL* ReleaseStatus)(OrtStatus*);          // 93
  void(ORT_API_CALL* ReleaseMemoryInfo)(OrtMemoryInfo*);  // 94
  void(ORT_API_CALL* ReleaseSession)(OrtSession*);        // 95
  void(ORT_API_CALL* ReleaseValue)(OrtValue*);            // 96
  OrtUnused places_97_to_99[3];
  void(ORT_API_CALL* ReleaseSessionOptions)(OrtSessionOptions*);  // 100
  OrtUnused places_101_to_129[29];
  OrtStatus*(ORT_API_CALL* AddSessionConfigEntry)(OrtSessionOptions*, const char* key, const char* value);  // 130
};

struct OrtApiBase {
  const OrtApi*(ORT_API_CALL* GetApi)(std::uint32_t version);
  const char*(ORT_API_CALL* GetVersionString)();
};

const OrtApiBase* ORT_API_CALL OrtGetApiBase();

}  // extern "C"

static_assert(offsetof(OrtApi, AddSessionConfigEntry) == 130 * sizeof(void*));
