// The weights of a Hugging Face model directory, single or sharded, memory-mapped; and their conversion row by row.
// Opening belongs to one thread; an open Checkpoint is const and may be read from any thread.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/bf16.h"
#include "model/safetensors.h"

namespace vericache {

class Checkpoint {
 public:
  // model.safetensors, or the shards that model.safetensors.index.json names.
  explicit Checkpoint(const std::filesystem::path& model_dir);

  bool has(std::string_view name) const { return where_.find(name) != where_.end(); }
  const TensorView& find(std::string_view name) const;  // Error if it is missing

  // As find(), and an Error unless the tensor is bf16, f16 or f32 of exactly this shape.
  const TensorView& find(std::string_view name, std::span<const int64_t> shape) const;

  std::vector<std::string> names() const;  // sorted
  uint64_t file_bytes() const;             // of all files together

  // Gives back the memory of a tensor that has been copied; see SafetensorsFile::release.
  void release(std::string_view name) const;

 private:
  struct Place {
    size_t file;
    const TensorView* tensor;  // lives in files_[file]'s map, which moves with the vector's elements
  };

  void open_single(const std::filesystem::path& path);
  void open_sharded(const std::filesystem::path& index_path);
  const Place& place(std::string_view name) const;

  std::filesystem::path model_dir_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, Place, std::less<>> where_;
};

// Rows [first, first + rows) of a bf16, f16 or f32 tensor, where a row is everything behind the first dimension,
// rounded to nearest even where the target is narrower. `out` has exactly their number of elements. Other dtypes: an
// Error.
void read_rows(const TensorView& tensor, int64_t first, int64_t rows, std::span<bf16> out);
void read_rows(const TensorView& tensor, int64_t first, int64_t rows, std::span<float> out);

float f16_to_float(uint16_t bits);  // IEEE binary16, subnormals included; exact

}  // namespace vericache
