// In the place of CUDA's runtime and driver, under the host code that nvcc makes: what would reach a GPU is written down
// as JSON, and refused where a device of compute capability 9.0 refuses it. Nothing runs.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <set>
#include <string>

namespace {

constexpr size_t kShared = 227 << 10, kSharedUnasked = 48 << 10;

std::string events;
std::map<const void*, std::string> names;
std::map<const void*, size_t> allowed;
cudaError_t last = cudaSuccess;
struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;

struct Settings {
  uint64_t capture = 0;
  int capture_query_fails = 0, no_encode = 0, refuses_decreasing_strides = 0, launch_fails = 0;
} settings;

void add(const std::string& event) { events += (events.empty() ? "" : ",") + ("{" + event + "}"); }
std::string number(const char* key, uint64_t value) { return "\"" + std::string(key) + "\":" + std::to_string(value); }
std::string list(const char* key, dim3 d) {
  return "\"" + std::string(key) + "\":[" + std::to_string(d.x) + "," + std::to_string(d.y) + "," +
         std::to_string(d.z) + "]";
}
cudaError_t fail(cudaError_t error) { return last = error; }

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  bool decreasing = false, wrong = reinterpret_cast<uintptr_t>(base) % 16 != 0;
  for (cuuint32_t i = 0; i + 1 < rank; ++i) {
    decreasing |= i > 0 && strides[i] < strides[i - 1];
    wrong |= strides[i] % 16 != 0 || strides[i] >= (uint64_t(1) << 40) || strides[i] == 0;
  }
  for (cuuint32_t i = 0; i < rank; ++i) wrong |= box[i] == 0 || box[i] > 256 || sizes[i] == 0;
  add("\"kind\":\"map\",\"decreasing\":" + std::string(decreasing ? "true" : "false"));
  if (wrong || (decreasing && settings.refuses_decreasing_strides)) return CUDA_ERROR_INVALID_VALUE;
  std::memset(static_cast<void*>(map), 0, sizeof *map);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) const char* standin_events() { return events.c_str(); }
__attribute__((visibility("default"))) void standin_clear() { events.clear(); }
__attribute__((visibility("default"))) void standin_set(const char* name, uint64_t value) {
  const std::string n(name);
  if (n == "capture") settings.capture = value;
  if (n == "capture_query_fails") settings.capture_query_fails = int(value);
  if (n == "no_encode") settings.no_encode = int(value);
  if (n == "refuses_decreasing_strides") settings.refuses_decreasing_strides = int(value);
  if (n == "launch_fails") settings.launch_fails = int(value);
}
__attribute__((visibility("default"))) int standin_last_error() { return int(last); }

// torch's device guard, which a torch without CUDA cannot make.
int32_t aoti_torch_create_device_guard(int32_t device, void** guard) {
  add("\"kind\":\"guard\"");
  *guard = &settings;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void*) {
  add("\"kind\":\"unguard\"");
  return 0;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  names[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t s) {
  const std::string& name = names[kernel];
  std::string event = "\"kind\":\"launch\",\"kernel\":\"" + name + "\"," + list("grid", grid) + "," +
                      list("block", block) + "," + number("shared", shared) + "," + number("stream", uint64_t(s));
  if (name.find("attention_decode_kernel") != std::string::npos) {
    event += "," + number("counters", uint64_t(*static_cast<void**>(args[2])));
  }
  add(event);
  const bool sizes = grid.x && grid.y && grid.z && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 &&
                     block.x * block.y * block.z <= 1024 && block.x && block.y && block.z && block.z <= 64;
  if (!sizes || shared > (allowed.count(kernel) ? allowed[kernel] : kSharedUnasked)) return fail(cudaErrorInvalidValue);
  return settings.launch_fails ? fail(cudaErrorLaunchOutOfResources) : cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (size_t(value) > kShared) return fail(cudaErrorInvalidValue);
  allowed[kernel] = size_t(value);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 0;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t) { return "the stand-in's error"; }
cudaError_t cudaMemsetAsync(void*, int, size_t bytes, cudaStream_t stream) {
  add("\"kind\":\"memset\"," + number("bytes", bytes) + "," + number("stream", uint64_t(stream)));
  return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  if (settings.capture) {
    add("\"kind\":\"capture broken\"");
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  *id = uint64_t(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  if (settings.capture_query_fails) return fail(cudaErrorStreamCaptureImplicit);
  *status = settings.capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  *id = settings.capture;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = settings.no_encode ? nullptr : reinterpret_cast<void*>(&encode);
  *found = settings.no_encode ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

}  // extern "C"
