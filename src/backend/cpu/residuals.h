// Encoding and decoding of pages whose layout is the CPU backend's.
// Any thread; done on return.
#pragma once

#include "backend/kernels.h"

namespace vericache {

void encode_residuals(const EncodeArgs& args);
void decode_residuals(const DecodeArgs& args);

}  // namespace vericache
