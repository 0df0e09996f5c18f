// The operators that PyTorch's compiled graphs call.
#pragma once
#include <cstdint>
#include <functional>

namespace mml {

// Stands at the end of a mask whose bits were written by this build; 0 where none were.
#ifdef __AVX512VL__
constexpr uint8_t MARK = 3;
#elif defined(__AVX2__)
constexpr uint8_t MARK = 2;
#else
constexpr uint8_t MARK = 1;
#endif

// Takes the functions of PyTorch's stable C interface, which ``find`` returns by name, or null, and
// registers the operators. False where PyTorch is too old to have them.
bool connect_pytorch(const std::function<void *(const char *)> &find);

// The threads that a large call may use, where PyTorch's setting is so many; below 1: a Python error,
// which is cleared. Takes Python's lock.
int threads_with(long setting);

}  // namespace mml
