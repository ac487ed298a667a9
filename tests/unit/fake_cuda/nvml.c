/* A libnvidia-ml.so.1 beside the driver: two GPUs with 1 GiB each, as far as we ask. The first has the Xids of
 * FAKE_CUDA_XIDS, one a wait; the second is gone if FAKE_CUDA_REFUSES has "second". No header of NVIDIA's is at hand to
 * compile it against: structs are those of nvidia-ml-py. */
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned long long total, free, used; } Memory;

int nvmlInit(void) { return 0; }  // torch asks for this one
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned int flags) { return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return "an error of the fake NVML"; }

int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return 0; }

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) {
  *device = (void *)(long)(index + 1);
  return 0;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
  if (strncmp(uuid, "GPU-00000000-0000-0000-0000-00000000000", 39)) return 6; /* NVML_ERROR_NOT_FOUND */
  *device = (void *)(long)(uuid[39] - '0');
  return 0;
}

int nvmlDeviceGetUUID(void *device, char *uuid, unsigned int length) {
  strcpy(uuid, "GPU-00000000-0000-0000-0000-000000000000");
  uuid[39] = '0' + (long)device;
  return 0;
}

int nvmlDeviceGetName(void *device, char *name, unsigned int length) { strcpy(name, "Fake GPU"); return 0; }

int nvmlEventSetCreate(void **set) { *set = malloc(1); return 0; }

int nvmlDeviceGetSupportedEventTypes(void *device, unsigned long long *types) { *types = 8; return 0; }

int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *set) {
  return types == 8 && set ? 0 : 2; /* nvmlEventTypeXidCriticalError, else NVML_ERROR_INVALID_ARGUMENT */
}

typedef struct { void *device; unsigned long long type, data; unsigned int gpu, compute; } Event;

int nvmlEventSetWait_v2(void *set, Event *event, unsigned int timeout_ms) {
  static char *rest;
  static int begun;
  if (!begun++) rest = getenv("FAKE_CUDA_XIDS");
  if (!rest || !*rest) return 10; /* NVML_ERROR_TIMEOUT */
  *event = (Event){(void *)1L, 8, strtoull(rest, &rest, 10), -1, -1};
  return 0;
}

int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
  const char *refuses = getenv("FAKE_CUDA_REFUSES");
  if (device == (void *)2L && refuses && strstr(refuses, "second")) return 15; /* NVML_ERROR_GPU_IS_LOST */
  *memory = (Memory){1ull << 30, 1ull << 30, 0};
  return 0;
}
