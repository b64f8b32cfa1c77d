// CudaDevice: memory of the first GPU under a budget, and pinned memory of the GPU's host.
// Allocation happens on the thread that builds the engine; ready() may be asked from there at any time.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "backend/device.h"

namespace vericache::cuda {

// Large host blocks are pinned piece by piece. Pieces begin at multiples of this address, and no copy may reach from
// one into the next: the driver takes them for different allocations.
inline constexpr size_t kSlabBytes = size_t{256} << 20;

// Why there is no GPU that this build can use; empty when there is one.
std::string why_no_gpu();
std::string gpu_name();

// Error when there is no GPU.
std::unique_ptr<Device> make_cuda_device(size_t budget_bytes);

}  // namespace vericache::cuda
