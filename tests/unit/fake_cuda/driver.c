/* A libcuda.so.1 for machines without a GPU: "device memory" is memfds. It is compiled against NVIDIA's cuda.h, so a
 * prototype that differs does not compile, and it is as strict about arguments as the header's text. It shows that
 * our calls are well-formed, and nothing about a GPU. New memory holds 0xAB: the real one is not zeroed either. */
#define _GNU_SOURCE
#include <cuda.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define DEVICES 2
#define GRANULARITY ((size_t)2 << 20)
#define REQUIRE(condition, error) do { if (!(condition)) return CUDA_ERROR_##error; } while (0)
#define READY() REQUIRE(initialized, NOT_INITIALIZED)

typedef struct { int fd, device; size_t size; } Allocation;
typedef struct { int fd; size_t size; CUdeviceptr address; } Block;

static int initialized;
static CUcontext current;
static Block blocks[64];

static int refuses(const char *what) {
  const char *list = getenv("FAKE_CUDA_REFUSES");
  return list && strstr(list, what);
}

static int new_memory(int device, size_t size) {
  char name[32];
  snprintf(name, sizeof name, "fake-gpu-%d", device);
  int fd = memfd_create(name, MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, size)) return -1;
  void *bytes = mmap(0, size, PROT_WRITE, MAP_SHARED, fd, 0);
  memset(bytes, 0xAB, size);
  munmap(bytes, size);
  return fd;
}

CUresult cuInit(unsigned int flags) { REQUIRE(flags == 0, INVALID_VALUE); initialized = 1; return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { READY(); *count = DEVICES; return CUDA_SUCCESS; }

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  READY();
  REQUIRE(ordinal >= 0 && ordinal < DEVICES, INVALID_DEVICE);
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  READY();
  REQUIRE(device >= 0 && device < DEVICES, INVALID_DEVICE);
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: *value = 50 << 20; return CUDA_SUCCESS;
    default: return CUDA_ERROR_INVALID_VALUE;
  }
}

/* sgl_kernel is linked against it. */
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  READY();
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
  READY();
  memset(uuid->bytes, 0, 16);
  uuid->bytes[15] = device + 1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice peer) {
  READY();
  REQUIRE(device != peer, INVALID_DEVICE);
  *can = !refuses("peers");
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) { READY(); *context = current; return CUDA_SUCCESS; }

static CUresult check(const CUmemAllocationProp *prop) {
  REQUIRE(prop->type == CU_MEM_ALLOCATION_TYPE_PINNED, INVALID_VALUE);
  REQUIRE(prop->requestedHandleTypes == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, INVALID_VALUE);
  REQUIRE(prop->location.type == CU_MEM_LOCATION_TYPE_DEVICE, INVALID_VALUE);
  REQUIRE(prop->location.id >= 0 && prop->location.id < DEVICES, INVALID_DEVICE);
  REQUIRE(prop->win32HandleMetaData == 0, INVALID_VALUE);
  return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *prop,
                                       CUmemAllocationGranularity_flags option) {
  READY();
  *granularity = GRANULARITY;
  return check(prop);
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *prop,
                     unsigned long long flags) {
  READY();
  REQUIRE(flags == 0 && size && size % GRANULARITY == 0, INVALID_VALUE);
  REQUIRE(check(prop) == CUDA_SUCCESS, INVALID_VALUE);
  REQUIRE(size <= (size_t)1 << 30, OUT_OF_MEMORY);
  Allocation *made = malloc(sizeof *made);
  *made = (Allocation){new_memory(prop->location.id, size), prop->location.id, size};
  *handle = (uintptr_t)made;
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  READY();
  close(((Allocation *)handle)->fd);
  free((void *)handle);
  return CUDA_SUCCESS;
}

CUresult cuMemExportToShareableHandle(void *out, CUmemGenericAllocationHandle handle, CUmemAllocationHandleType type,
                                      unsigned long long flags) {
  READY();
  REQUIRE(flags == 0 && type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, INVALID_VALUE);
  REQUIRE(!refuses("export"), NOT_SUPPORTED);
  *(int *)out = dup(((Allocation *)handle)->fd);
  return CUDA_SUCCESS;
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle, void *os_handle,
                                        CUmemAllocationHandleType type) {
  READY();
  REQUIRE(type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, INVALID_VALUE);
  int fd = (int)(uintptr_t)os_handle, device;
  char path[64], link[128] = "";
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  REQUIRE(readlink(path, link, sizeof link - 1) > 0, INVALID_VALUE);
  REQUIRE(sscanf(link, "/memfd:fake-gpu-%d", &device) == 1, INVALID_VALUE);
  struct stat facts;
  fstat(fd, &facts);
  Allocation *made = malloc(sizeof *made);
  *made = (Allocation){dup(fd), device, facts.st_size};
  *handle = (uintptr_t)made;
  return CUDA_SUCCESS;
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *prop, CUmemGenericAllocationHandle handle) {
  READY();
  memset(prop, 0, sizeof *prop);
  prop->type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop->requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  prop->location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  prop->location.id = ((Allocation *)handle)->device;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr *address, size_t size, size_t alignment, CUdeviceptr hint,
                             unsigned long long flags) {
  READY();
  REQUIRE(size && size % GRANULARITY == 0 && alignment == 0 && hint == 0 && flags == 0, INVALID_VALUE);
  *address = (CUdeviceptr)mmap(0, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
  READY();
  REQUIRE(munmap((void *)address, size) == 0, INVALID_VALUE);
  return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
  READY();
  Allocation *of = (Allocation *)handle;
  REQUIRE(offset == 0 && flags == 0 && size % GRANULARITY == 0 && size <= of->size, INVALID_VALUE);
  void *mapped = mmap((void *)address, size, PROT_NONE, MAP_SHARED | MAP_FIXED, of->fd, 0);
  REQUIRE(mapped != MAP_FAILED, INVALID_VALUE);
  return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc *desc, size_t count) {
  READY();
  REQUIRE(count == 1 && desc->location.type == CU_MEM_LOCATION_TYPE_DEVICE, INVALID_VALUE);
  REQUIRE(desc->location.id >= 0 && desc->location.id < DEVICES, INVALID_DEVICE);
  int read = desc->flags == CU_MEM_ACCESS_FLAGS_PROT_READ;
  REQUIRE(read || desc->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE, INVALID_VALUE);
  REQUIRE(!(read && refuses("read-only")), NOT_SUPPORTED);
  REQUIRE(mprotect((void *)address, size, PROT_READ | (read ? 0 : PROT_WRITE)) == 0, INVALID_VALUE);
  return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
  READY();
  void *mapped = mmap((void *)address, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  REQUIRE(mapped != MAP_FAILED, INVALID_VALUE);
  return CUDA_SUCCESS;
}

/* What needs a context. */
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  READY();
  *context = (CUcontext)(uintptr_t)(device + 1);
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { READY(); current = context; return CUDA_SUCCESS; }

CUresult cuMemAlloc(CUdeviceptr *address, size_t size) {
  REQUIRE(current, INVALID_CONTEXT);
  REQUIRE(size && size <= (size_t)1 << 30, OUT_OF_MEMORY);
  for (Block *block = blocks; block < blocks + 64; block++) {
    if (block->address) continue;
    block->fd = new_memory((int)(uintptr_t)current - 1, size);
    block->size = size;
    *address = block->address =
        (CUdeviceptr)mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, block->fd, 0);
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_OUT_OF_MEMORY;
}

static Block *find(CUdeviceptr address) {
  for (Block *block = blocks; block < blocks + 64; block++)
    if (address && block->address == address) return block;
  return 0;
}

CUresult cuMemFree(CUdeviceptr address) {
  REQUIRE(current, INVALID_CONTEXT);
  Block *block = find(address);
  REQUIRE(block, INVALID_VALUE);
  munmap((void *)address, block->size);
  close(block->fd);
  *block = (Block){0};
  return CUDA_SUCCESS;
}

CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr address) {
  REQUIRE(current, INVALID_CONTEXT);
  Block *block = find(address);
  REQUIRE(block, INVALID_VALUE);
  memset(handle->reserved, 0, sizeof handle->reserved);
  snprintf(handle->reserved, sizeof handle->reserved, "/proc/%d/fd/%d", getpid(), block->fd);
  return CUDA_SUCCESS;
}

CUresult cuIpcOpenMemHandle(CUdeviceptr *address, CUipcMemHandle handle, unsigned int flags) {
  REQUIRE(current, INVALID_CONTEXT);
  REQUIRE(flags == CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, INVALID_VALUE);
  int fd = open(handle.reserved, O_RDWR | O_CLOEXEC);
  REQUIRE(fd >= 0, INVALID_VALUE);
  struct stat facts;
  fstat(fd, &facts);
  *address = (CUdeviceptr)mmap(0, facts.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  return CUDA_SUCCESS;
}

CUresult cuIpcCloseMemHandle(CUdeviceptr address) { REQUIRE(current && address, INVALID_CONTEXT); return CUDA_SUCCESS; }

CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t size) {
  REQUIRE(current, INVALID_CONTEXT);
  memcpy((void *)to, from, size);
  return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoH(void *to, CUdeviceptr from, size_t size) {
  REQUIRE(current, INVALID_CONTEXT);
  memcpy(to, (void *)from, size);
  return CUDA_SUCCESS;
}

/* cuda-bindings asks for every symbol here. */
#define ENTRY(function) {#function, (void *)function}
CUresult cuGetProcAddress(const char *symbol, void **function, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult *status) {
  static const struct { const char *name; void *function; } table[] = {
      {"cuDeviceGetUuid", cuDeviceGetUuid}, {"cuMemAlloc", cuMemAlloc}, {"cuMemFree", cuMemFree},
      {"cuMemcpyHtoD", cuMemcpyHtoD}, {"cuMemcpyDtoH", cuMemcpyDtoH}, {"cuIpcOpenMemHandle", cuIpcOpenMemHandle},
      {"cuGetProcAddress", cuGetProcAddress},
      ENTRY(cuInit), ENTRY(cuDriverGetVersion), ENTRY(cuDeviceGetCount), ENTRY(cuDeviceGet), ENTRY(cuDeviceCanAccessPeer),
      ENTRY(cuCtxGetCurrent), ENTRY(cuDeviceGetAttribute),
      ENTRY(cuMemGetAllocationGranularity), ENTRY(cuMemCreate), ENTRY(cuMemRelease),
      ENTRY(cuMemExportToShareableHandle), ENTRY(cuMemImportFromShareableHandle),
      ENTRY(cuMemGetAllocationPropertiesFromHandle), ENTRY(cuMemAddressReserve), ENTRY(cuMemAddressFree),
      ENTRY(cuMemMap), ENTRY(cuMemSetAccess), ENTRY(cuMemUnmap), ENTRY(cuDevicePrimaryCtxRetain),
      ENTRY(cuCtxSetCurrent), ENTRY(cuIpcGetMemHandle), ENTRY(cuIpcCloseMemHandle),
  };
  for (size_t i = 0; i < sizeof table / sizeof *table; i++)
    if (strcmp(table[i].name, symbol) == 0) {
      *function = table[i].function;
      if (status) *status = CU_GET_PROC_ADDRESS_SUCCESS;
      return CUDA_SUCCESS;
    }
  *function = 0;
  if (status) *status = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return CUDA_ERROR_NOT_FOUND;
}
