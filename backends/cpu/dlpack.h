// The parts of DLPack 1.x that are read here: https://dmlc.github.io/dlpack/latest/c_api.html
#pragma once
#include <cstdint>

enum { kDLCPU = 1 };
enum { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4 };

struct DLDevice {
    int32_t device_type, device_id;
};
struct DLDataType {
    uint8_t code, bits;
    uint16_t lanes;
};
struct DLTensor {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape, *strides;  // strides in elements
    uint64_t byte_offset;
};
struct DLManagedTensorVersioned;

struct DLPackExchangeAPIHeader {
    struct {
        uint32_t major, minor;
    } version;
    DLPackExchangeAPIHeader *prev_api;
};
struct DLPackExchangeAPI {
    DLPackExchangeAPIHeader header;
    int (*managed_tensor_allocator)(DLTensor *, DLManagedTensorVersioned **, void *,
                                    void (*)(void *, const char *, const char *));
    int (*managed_tensor_from_py_object_no_sync)(void *, DLManagedTensorVersioned **);
    int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned *, void **);
    int (*dltensor_from_py_object_no_sync)(void *, DLTensor *);
    int (*current_work_stream)(int32_t, int32_t, void **);
};

// The table of version 1, which a library may keep behind a newer one.
inline const DLPackExchangeAPI *find_exchange(void *pointer) {
    for (auto *header = static_cast<DLPackExchangeAPIHeader *>(pointer); header; header = header->prev_api)
        if (header->version.major == 1) {
            auto *api = reinterpret_cast<const DLPackExchangeAPI *>(header);
            return api->dltensor_from_py_object_no_sync ? api : nullptr;
        }
    return nullptr;
}
