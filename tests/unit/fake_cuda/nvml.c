/* A libnvidia-ml.so.1 beside the driver: two GPUs with 1 GiB each, as far as we ask. */
#include <string.h>

typedef struct { unsigned long long total, free, used; } Memory;

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

int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
  *memory = (Memory){1ull << 30, 1ull << 30, 0};
  return 0;
}
