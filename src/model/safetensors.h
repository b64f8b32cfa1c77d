// A safetensors file: its header checked before any byte of data is touched, its tensors as views into a read-only map.
// Opening and writing belong to one thread; a SafetensorsFile that is open may be read from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace vericache {

enum class TensorDtype { boolean, u8, i8, f8_e4m3, f8_e5m2, u16, i16, f16, bf16, u32, i32, f32, u64, i64, f64 };

size_t dtype_bytes(TensorDtype dtype);
std::string_view dtype_name(TensorDtype dtype);  // as the format spells it: "BF16"

// Row-major; an empty shape is a scalar. The bytes are shape's product times the dtype's size, of no promised
// alignment.
struct TensorView {
  TensorDtype dtype;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;
};

using TensorMap = std::map<std::string, TensorView, std::less<>>;

std::string shape_string(std::span<const int64_t> shape);  // "(2, 3)"

// Checks a whole file held in memory and returns views into it. `where` names the file in the Error that a truncated,
// overlapping, overflowing or otherwise lying header gives. Format: github.com/huggingface/safetensors, "Format".
TensorMap parse_safetensors(std::span<const std::byte> file, std::string_view where);

class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);
  ~SafetensorsFile();
  SafetensorsFile(SafetensorsFile&& other) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&& other) noexcept;
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  const TensorMap& tensors() const { return tensors_; }
  const TensorView* find(std::string_view name) const;  // null if there is no such tensor
  uint64_t file_bytes() const { return file_.size(); }

  // Gives the memory of a tensor's pages back once it has been copied, so that loading does not hold the weights twice.
  // The view stays valid: reading it again reads the file again.
  void release(const TensorView& tensor) const;

 private:
  std::filesystem::path path_;
  std::span<const std::byte> file_;
  TensorMap tensors_;
};

// Writes the tensors, each aligned to its element size; an existing file is replaced. Error if the disk refuses.
void write_safetensors(const std::filesystem::path& path, const TensorMap& tensors);

}  // namespace vericache
