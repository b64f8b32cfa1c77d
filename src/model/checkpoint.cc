#include "model/checkpoint.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/check.h"
#include "base/error.h"
#include "model/strict_json.h"

namespace vericache {
namespace {

constexpr std::string_view kSingleName = "model.safetensors";
constexpr std::string_view kIndexName = "model.safetensors.index.json";
constexpr size_t kMaxIndexBytes = 64 << 20;

bool is_weight_dtype(TensorDtype dtype) {
  return dtype == TensorDtype::bf16 || dtype == TensorDtype::f16 || dtype == TensorDtype::f32;
}

// A shard is a file of the model's own directory: a path in its place would read whatever the index asks for.
void check_shard_name(const std::string& shard, const std::filesystem::path& index_path) {
  const bool plain = !shard.empty() && shard != "." && shard != ".." &&
                     shard.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
  if (!plain) {
    throw Error("{}: \"{}\" is not a plain file name; shards lie beside the index", index_path.string(),
                printable(shard));
  }
}

[[noreturn]] void no_weights(const std::filesystem::path& model_dir) {
  std::error_code error;  // an unreadable directory is no reason to say less
  for (const auto& entry : std::filesystem::directory_iterator(model_dir, error)) {
    const std::string extension = entry.path().extension().string();
    if (extension == ".bin" || extension == ".gguf" || extension == ".pt" || extension == ".pth") {
      throw Error("{} has neither {} nor {}, but {}: convert it to safetensors first (save_pretrained of transformers)",
                  model_dir.string(), kSingleName, kIndexName, entry.path().filename().string());
    }
  }
  throw Error("{} has neither {} nor {}; download the model's weights in safetensors form", model_dir.string(),
              kSingleName, kIndexName);
}

template <typename Word>
Word load(const std::byte* from) {  // the file promises no alignment
  Word word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

void store(float value, float& out) {
  out = value;
}
void store(float value, bf16& out) {
  out = to_bf16(value);
}

template <typename Out>
void convert(TensorDtype dtype, const std::byte* in, std::span<Out> out) {
  switch (dtype) {
    case TensorDtype::bf16:
      for (size_t i = 0; i < out.size(); ++i) {
        store(to_float(bf16{load<uint16_t>(in + 2 * i)}), out[i]);
      }
      return;
    case TensorDtype::f16:
      for (size_t i = 0; i < out.size(); ++i) {
        store(f16_to_float(load<uint16_t>(in + 2 * i)), out[i]);
      }
      return;
    case TensorDtype::f32:
      for (size_t i = 0; i < out.size(); ++i) {
        store(load<float>(in + 4 * i), out[i]);
      }
      return;
    default:
      throw Error("cannot read a tensor of {} as weights; supported are BF16, F16 and F32", dtype_name(dtype));
  }
}

// The first byte of row `first`, after checking that the caller's buffer and rows fit the tensor.
const std::byte* rows_begin(const TensorView& tensor, int64_t first, int64_t rows, size_t out_elements) {
  const int64_t all_rows = tensor.shape.empty() ? 1 : tensor.shape[0];
  check(first >= 0 && rows >= 0 && first <= all_rows && rows <= all_rows - first, "the rows to read lie in the tensor");
  const size_t elements = tensor.bytes.size() / dtype_bytes(tensor.dtype);
  const size_t row_elements = all_rows == 0 ? 0 : elements / static_cast<size_t>(all_rows);
  check(out_elements == static_cast<size_t>(rows) * row_elements, "the buffer holds exactly the rows to read");
  return tensor.bytes.data() + static_cast<size_t>(first) * row_elements * dtype_bytes(tensor.dtype);
}

}  // namespace

Checkpoint::Checkpoint(const std::filesystem::path& model_dir) : model_dir_(model_dir) {
  std::error_code error;
  if (!std::filesystem::is_directory(model_dir, error)) {
    throw Error("{} is not a directory; --model takes the folder that holds config.json and {}", model_dir.string(),
                kSingleName);
  }
  if (std::filesystem::exists(model_dir / kSingleName, error)) {
    open_single(model_dir / kSingleName);
  } else if (std::filesystem::exists(model_dir / kIndexName, error)) {
    open_sharded(model_dir / kIndexName);
  } else {
    no_weights(model_dir);
  }
}

void Checkpoint::open_single(const std::filesystem::path& path) {
  files_.emplace_back(path);
  for (const auto& [name, tensor] : files_[0].tensors()) {
    where_.emplace(name, Place{0, &tensor});
  }
}

void Checkpoint::open_sharded(const std::filesystem::path& index_path) {
  const nlohmann::json index = parse_strict_json(read_text_file(index_path, kMaxIndexBytes), index_path.string());
  const auto weight_map = index.find("weight_map");
  if (weight_map == index.end() || !weight_map->is_object() || weight_map->empty()) {
    throw Error("{}: no \"weight_map\" from tensor names to shards; download it again", index_path.string());
  }
  std::map<std::string, size_t> shards;  // name -> its place in files_
  for (const auto& [name, shard] : weight_map->items()) {
    if (!shard.is_string()) {
      throw Error("{}: the shard of tensor \"{}\" is not a file name", index_path.string(), printable(name));
    }
    check_shard_name(shard.get_ref<const std::string&>(), index_path);
    shards.emplace(shard.get<std::string>(), 0);
  }
  files_.reserve(shards.size());
  for (auto& [shard, file] : shards) {
    if (std::error_code error; !std::filesystem::exists(model_dir_ / shard, error)) {
      throw Error("{} names the shard {}, which is not there; download all {} shards", index_path.string(),
                  printable(shard), shards.size());
    }
    file = files_.size();
    files_.emplace_back(model_dir_ / shard);
  }
  for (const auto& [name, shard] : weight_map->items()) {
    const size_t file = shards.at(shard.get<std::string>());
    const TensorView* tensor = files_[file].find(name);
    if (tensor == nullptr) {
      throw Error("{} says that tensor \"{}\" is in {}, which has no such tensor; download both again",
                  index_path.string(), printable(name), printable(shard.get_ref<const std::string&>()));
    }
    where_.emplace(name, Place{file, tensor});
  }
}

const Checkpoint::Place& Checkpoint::place(std::string_view name) const {
  const auto found = where_.find(name);
  if (found == where_.end()) {
    throw Error("{}: the tensor \"{}\" is missing among its {}; config.json and the weights do not belong together",
                model_dir_.string(), printable(name), where_.size());
  }
  return found->second;
}

const TensorView& Checkpoint::find(std::string_view name) const {
  return *place(name).tensor;
}

const TensorView& Checkpoint::find(std::string_view name, std::span<const int64_t> shape) const {
  const TensorView& tensor = find(name);
  if (!is_weight_dtype(tensor.dtype)) {
    throw Error("{}: tensor \"{}\" is {}; supported are BF16, F16 and F32 (quantized checkpoints are not)",
                model_dir_.string(), printable(name), dtype_name(tensor.dtype));
  }
  if (!std::equal(shape.begin(), shape.end(), tensor.shape.begin(), tensor.shape.end())) {
    throw Error("{}: tensor \"{}\" has shape {}, config.json asks for {}; they do not belong together",
                model_dir_.string(), printable(name), shape_string(tensor.shape), shape_string(shape));
  }
  return tensor;
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  names.reserve(where_.size());
  for (const auto& [name, place] : where_) {
    names.push_back(name);
  }
  return names;
}

uint64_t Checkpoint::file_bytes() const {
  uint64_t bytes = 0;
  for (const SafetensorsFile& file : files_) {
    bytes += file.file_bytes();
  }
  return bytes;
}

void Checkpoint::release(std::string_view name) const {
  const Place& found = place(name);
  files_[found.file].release(*found.tensor);
}

void read_rows(const TensorView& tensor, int64_t first, int64_t rows, std::span<bf16> out) {
  const std::byte* in = rows_begin(tensor, first, rows, out.size());
  if (tensor.dtype == TensorDtype::bf16) {
    if (!out.empty()) {
      std::memcpy(out.data(), in, out.size_bytes());  // bits as they are, signalling NaN included
    }
    return;
  }
  convert(tensor.dtype, in, out);
}

void read_rows(const TensorView& tensor, int64_t first, int64_t rows, std::span<float> out) {
  convert(tensor.dtype, rows_begin(tensor, first, rows, out.size()), out);
}

float f16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t fraction = bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, which float holds exactly as a normal number
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  const uint32_t wide_exponent = exponent == 0x1fu ? 0xffu : exponent + (127 - 15);
  return std::bit_cast<float>(sign | (wide_exponent << 23) | (fraction << 13));
}

}  // namespace vericache
