#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>

#include "base/error.h"
#include "model/safetensors.h"
#include "model/strict_json.h"

namespace vericache {

void write_safetensors(const std::filesystem::path& path, const TensorMap& tensors) {
  std::vector<const TensorMap::value_type*> order;
  for (const auto& named : tensors) {
    order.push_back(&named);
  }
  // The widest elements first: then every tensor is aligned to its own.
  std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return dtype_bytes(a->second.dtype) > dtype_bytes(b->second.dtype);
  });
  nlohmann::json header = nlohmann::json::object();
  uint64_t offset = 0;
  for (const auto* named : order) {
    const TensorView& tensor = named->second;
    const uint64_t end = offset + tensor.bytes.size();
    header[named->first] = {
        {"dtype", dtype_name(tensor.dtype)}, {"shape", tensor.shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  std::string length(sizeof(uint64_t), '\0');
  for (size_t i = 0; i < length.size(); ++i) {  // little-endian on every host
    length[i] = static_cast<char>((text.size() >> (8 * i)) & 0xff);
  }
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << length << text;
  for (const auto* named : order) {
    const auto bytes = named->second.bytes;
    out.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  }
  out.close();
  if (!out) {
    throw Error("cannot write {}: {}; check the folder and the free space", path.string(), std::strerror(errno));
  }
}

}  // namespace vericache
