/* What ONNX Runtime's CUDA provider asks of CUDA while it loads, lists its kernels and places nodes.
 *
 * Compiled once per library with -DLIBRARY_<name>; a symbol that the provider imports and that is not here returns 0.
 * "Device memory" is host memory and nothing is launched: a placement can be read off, a result means nothing.
 * The device is described as one of compute capability 9.0 with 80 GiB.
 */

#ifdef LIBRARY_cudart
#include <cuda_runtime_api.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#define GIB ((size_t)1 << 30)
#define CUDA_13 13000

static cudaError_t set(int *where, int value) {
  *where = value;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) { return set(count, 1); }
cudaError_t cudaGetDevice(int *device) { return set(device, 0); }
cudaError_t cudaRuntimeGetVersion(int *version) { return set(version, CUDA_13); }
cudaError_t cudaDriverGetVersion(int *version) { return set(version, CUDA_13); }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "stub");
  properties->major = 9;
  properties->totalGlobalMem = 80 * GIB;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxGridSize[0] = INT_MAX;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = 227 << 10;
  properties->sharedMemPerMultiprocessor = 228 << 10;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: return set(value, 9);
    case cudaDevAttrComputeCapabilityMinor: return set(value, 0);
    case cudaDevAttrMultiProcessorCount: return set(value, 132);
    case cudaDevAttrMaxSharedMemoryPerBlock: return set(value, 48 << 10);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return set(value, 227 << 10);
    case cudaDevAttrMaxThreadsPerBlock: return set(value, 1024);
    case cudaDevAttrMaxThreadsPerMultiProcessor: return set(value, 2048);
    case cudaDevAttrMaxGridDimX: return set(value, INT_MAX);
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return set(value, 65535);
    case cudaDevAttrWarpSize: return set(value, 32);
    default: return set(value, 1);
  }
}

cudaError_t cudaMalloc(void **memory, size_t size) {
  *memory = aligned_alloc(256, (size + 511) / 256 * 256);
  return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaMallocHost(void **memory, size_t size) { return cudaMalloc(memory, size); }
cudaError_t cudaHostAlloc(void **memory, size_t size, unsigned flags) { return cudaMalloc(memory, size); }
cudaError_t cudaMallocFromPoolAsync(void **memory, size_t size, cudaMemPool_t pool, cudaStream_t stream) {
  return cudaMalloc(memory, size);
}
cudaError_t cudaFree(void *memory) { return free(memory), cudaSuccess; }
cudaError_t cudaFreeHost(void *memory) { return free(memory), cudaSuccess; }
cudaError_t cudaFreeAsync(void *memory, cudaStream_t stream) { return free(memory), cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) { return *free_bytes = *total = 80 * GIB, cudaSuccess; }

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  return memcpy(to, from, size), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return memcpy(to, from, size), cudaSuccess;
}
cudaError_t cudaMemset(void *memory, int value, size_t size) { return memset(memory, value, size), cudaSuccess; }
cudaError_t cudaMemsetAsync(void *memory, int value, size_t size, cudaStream_t stream) {
  return memset(memory, value, size), cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *memory) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = cudaMemoryTypeDevice;
  return cudaSuccess;
}

static char handle[4096]; /* stands for every stream, event and pool */

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return *stream = (cudaStream_t)handle, cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return *event = (cudaEvent_t)handle, cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const struct cudaMemPoolProps *properties) {
  return *pool = (cudaMemPool_t)handle, cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel, int size,
                                                                   size_t shared, unsigned flags) {
  return set(blocks, 1);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
  return memset(attributes, 0, sizeof *attributes), cudaSuccess;
}
const char *cudaGetErrorName(cudaError_t error) { return "stub"; }
const char *cudaGetErrorString(cudaError_t error) { return "stub"; }

void **__cudaRegisterFatBinary(void *images) { return (void **)handle; }
#endif

#ifdef LIBRARY_cublas
static char handle[4096];
int cublasCreate_v2(void **created) { return *created = handle, 0; }
const char *cublasGetStatusName(int status) { return "stub"; }
const char *cublasGetStatusString(int status) { return "stub"; }
#endif

#ifdef LIBRARY_cublasLt
static char handle[4096];
int cublasLtCreate(void **created) { return *created = handle, 0; }
#endif
