// The ways in which pages are coded, each with kernels of its own, and what encoding and decoding blocks have in
// common: a block takes a head page, a warp a row at a time. Device code and launchers of residual_encode.cu and
// residual_decode.cu.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "backend/cuda/head_dim.h"
#include "backend/cuda/ops.h"
#include "backend/cuda/packed_layout.h"

namespace vericache::cuda {

constexpr int kResidualThreads = 256;
constexpr int kResidualWarps = kResidualThreads / 32;

// Rotated formats and outliers take more registers and shared memory than the others.
enum class Form { lossless, resident, nuq, rotated };

inline Form form_of(ResidualCode code, const KvFormat& format) {
  return code == ResidualCode::lossless ? Form::lossless
         : format.rotated               ? Form::rotated
         : format.code == KvCode::nuq   ? Form::nuq
                                        : Form::resident;
}

// run(a value whose type tells the form)
template <Form kForm>
using FixedForm = std::integral_constant<Form, kForm>;
template <typename Run>
void for_form(Form form, const Run& run) {
  switch (form) {
    case Form::lossless:
      return run(FixedForm<Form::lossless>());
    case Form::resident:
      return run(FixedForm<Form::resident>());
    case Form::nuq:
      return run(FixedForm<Form::nuq>());
    case Form::rotated:
      return run(FixedForm<Form::rotated>());
  }
}

template <int kHeadDim>
struct BlockShape {
  static constexpr int kKeyRows = kHeadDim / 4;
  static constexpr int kRows = 2 * kKeyRows;
  static constexpr size_t kHeadPageBytes = size_t{2} * kPageTokens * kHeadDim * 2;
};

__device__ inline const std::byte* resident_page(const KvView& resident, int head, int page) {
  return resident.head_pages[static_cast<ptrdiff_t>(head) * resident.page_stride + page];
}
__device__ inline const std::byte* resident_part(const KvView& resident, int head, int page, bool keys, int head_dim) {
  const std::byte* packed = resident_page(resident, head, page);
  return keys ? packed : packed + bytes_of(key_pieces(resident.format.key(), head_dim));
}

}  // namespace vericache::cuda
