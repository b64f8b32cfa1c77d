#include "model/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/error.h"
#include "model/strict_json.h"

namespace vericache {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation
constexpr size_t kLengthBytes = 8;
constexpr size_t kMaxRank = 8;

struct DtypeEntry {
  TensorDtype dtype;
  std::string_view name;
  size_t bytes;
};

constexpr std::array<DtypeEntry, 15> kDtypes = {{{TensorDtype::boolean, "BOOL", 1},
                                                 {TensorDtype::u8, "U8", 1},
                                                 {TensorDtype::i8, "I8", 1},
                                                 {TensorDtype::f8_e4m3, "F8_E4M3", 1},
                                                 {TensorDtype::f8_e5m2, "F8_E5M2", 1},
                                                 {TensorDtype::u16, "U16", 2},
                                                 {TensorDtype::i16, "I16", 2},
                                                 {TensorDtype::f16, "F16", 2},
                                                 {TensorDtype::bf16, "BF16", 2},
                                                 {TensorDtype::u32, "U32", 4},
                                                 {TensorDtype::i32, "I32", 4},
                                                 {TensorDtype::f32, "F32", 4},
                                                 {TensorDtype::u64, "U64", 8},
                                                 {TensorDtype::i64, "I64", 8},
                                                 {TensorDtype::f64, "F64", 8}}};

const DtypeEntry& entry(TensorDtype dtype) {
  return kDtypes[static_cast<size_t>(dtype)];
}

struct HeaderTensor {
  TensorDtype dtype = TensorDtype::f32;
  std::vector<int64_t> shape;
  uint64_t begin = 0;
  uint64_t end = 0;
};

using Header = std::map<std::string, HeaderTensor>;

// Reads the header without building a JSON tree: whatever is not {name: {dtype, shape, data_offsets}} stops it at once,
// so a hostile header costs no more memory than its own bytes.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeaderReader(std::string_view where) : where_(where) {}
  Header take() { return std::move(header_); }

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool number_integer(number_integer_t) override { return unexpected("a negative number"); }
  bool number_float(number_float_t, const string_t&) override {
    return unexpected("a fraction or a number beyond 64 bits");
  }
  bool binary(binary_t&) override { return unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (place_ != Place::shape && place_ != Place::offsets) {
      return unexpected("a number");
    }
    auto& list = place_ == Place::shape ? shape_ : offsets_;
    if (list.size() == (place_ == Place::shape ? kMaxRank : 2)) {
      throw Error("{}: tensor \"{}\" has more than {} numbers in \"{}\"{}", where_, printable(name_), list.size(), key_,
                  kRemedy);
    }
    list.push_back(value);
    return true;
  }

  bool string(string_t& value) override {
    if (place_ == Place::metadata) {
      return true;
    }
    if (place_ != Place::tensor || key_ != "dtype") {
      return unexpected("a string");
    }
    dtype_ = value;
    return true;
  }

  bool start_object(std::size_t) override {
    if (place_ == Place::outside) {
      place_ = Place::header;
    } else if (place_ == Place::header) {
      start_entry();
    } else {
      return unexpected("an object");
    }
    return true;
  }

  bool key(string_t& value) override {
    if (place_ == Place::header) {
      name_ = value;
    } else if (place_ == Place::tensor) {
      key_ = value;
      const auto field = std::find(kFields.begin(), kFields.end(), value);
      if (field == kFields.end() || std::exchange(seen_[static_cast<size_t>(field - kFields.begin())], true)) {
        throw Error(
            "{}: tensor \"{}\" has an unknown or repeated field \"{}\"; a tensor has dtype, shape, data_offsets{}",
            where_, printable(name_), printable(value), kRemedy);
      }
    }
    return true;
  }

  bool end_object() override {
    if (place_ == Place::tensor) {
      finish_tensor();
    }
    place_ = place_ == Place::header ? Place::outside : Place::header;
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ != Place::tensor || key_ == "dtype") {
      return unexpected("a list");
    }
    place_ = key_ == "shape" ? Place::shape : Place::offsets;
    return true;
  }

  bool end_array() override {
    place_ = Place::tensor;
    return true;
  }

  bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception& e) override {
    throw Error("{}: the header is not valid JSON ({}){}", where_, printable(e.what(), 240), kRemedy);
  }

  static constexpr std::string_view kRemedy = "; the file is damaged or no safetensors file, download it again";

 private:
  enum class Place { outside, header, metadata, tensor, shape, offsets };
  static constexpr std::array<std::string_view, 3> kFields = {"dtype", "shape", "data_offsets"};

  bool unexpected(std::string_view what) const {
    throw Error("{}: the header has {} at the wrong place{}{}", where_, what,
                name_.empty() ? std::string() : fmt::format(" (near \"{}\")", printable(name_)), kRemedy);
  }

  void start_entry() {
    if (name_ == "__metadata__") {
      if (std::exchange(metadata_seen_, true)) {
        throw Error("{}: the header has \"__metadata__\" twice{}", where_, kRemedy);
      }
      place_ = Place::metadata;
      return;
    }
    place_ = Place::tensor;
    seen_ = {};
    shape_.clear();
    offsets_.clear();
  }

  void finish_tensor() {
    if (!std::all_of(seen_.begin(), seen_.end(), [](bool seen) { return seen; }) || offsets_.size() != 2) {
      throw Error("{}: tensor \"{}\" lacks its dtype, shape or two data_offsets{}", where_, printable(name_), kRemedy);
    }
    const auto known = std::find_if(kDtypes.begin(), kDtypes.end(), [&](const auto& d) { return d.name == dtype_; });
    if (known == kDtypes.end()) {
      throw Error("{}: tensor \"{}\" has the unknown dtype \"{}\"; weights may be BF16, F16 or F32", where_,
                  printable(name_), printable(dtype_));
    }
    HeaderTensor tensor{known->dtype, {}, offsets_[0], offsets_[1]};
    for (const uint64_t extent : shape_) {
      if (extent > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
        throw Error("{}: tensor \"{}\" has a dimension of {}{}", where_, printable(name_), extent, kRemedy);
      }
      tensor.shape.push_back(static_cast<int64_t>(extent));
    }
    if (!header_.emplace(name_, std::move(tensor)).second) {
      throw Error("{}: the tensor name \"{}\" appears twice{}", where_, printable(name_), kRemedy);
    }
  }

  std::string_view where_;
  Header header_;
  Place place_ = Place::outside;
  bool metadata_seen_ = false;
  std::string name_;  // of the entry being read
  std::string key_;   // of the field being read
  std::array<bool, 3> seen_{};
  std::string dtype_;
  std::vector<uint64_t> shape_;
  std::vector<uint64_t> offsets_;
};

// The length of the JSON header; the data starts kLengthBytes after it.
size_t header_bytes(std::span<const std::byte> file, std::string_view where) {
  if (file.size() < kLengthBytes) {
    throw Error("{}: {} bytes are too few for a safetensors file{}", where, file.size(), HeaderReader::kRemedy);
  }
  uint64_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) {  // little-endian on every host
    length |= std::to_integer<uint64_t>(file[i]) << (8 * i);
  }
  if (length > kMaxHeaderBytes) {
    throw Error("{}: a header of {} bytes, more than the {} the format allows{}", where, length, kMaxHeaderBytes,
                HeaderReader::kRemedy);
  }
  if (length > file.size() - kLengthBytes) {
    throw Error("{}: truncated: a header of {} bytes is announced, {} bytes follow; download it again", where, length,
                file.size() - kLengthBytes);
  }
  if (length == 0 || file[kLengthBytes] != std::byte{'{'}) {
    throw Error("{}: the header does not start with '{{'{}", where, HeaderReader::kRemedy);
  }
  return static_cast<size_t>(length);
}

void check_extent(const std::string& name, const HeaderTensor& tensor, uint64_t data_bytes, std::string_view where) {
  if (tensor.begin > tensor.end) {
    throw Error("{}: tensor \"{}\" ends (byte {}) before it begins (byte {}){}", where, printable(name), tensor.end,
                tensor.begin, HeaderReader::kRemedy);
  }
  if (tensor.end > data_bytes) {
    throw Error("{}: truncated: tensor \"{}\" ends at byte {} of the data, the file holds {}; download it again", where,
                printable(name), tensor.end, data_bytes);
  }
  uint64_t bytes = dtype_bytes(tensor.dtype);
  bool fits = true;
  for (const int64_t extent : tensor.shape) {
    fits = !__builtin_mul_overflow(bytes, static_cast<uint64_t>(extent), &bytes) && fits;
  }
  if (!fits || bytes != tensor.end - tensor.begin) {
    throw Error("{}: tensor \"{}\" of {} {} does not fill the {} bytes its data_offsets give it{}", where,
                printable(name), dtype_name(tensor.dtype), shape_string(tensor.shape), tensor.end - tensor.begin,
                HeaderReader::kRemedy);
  }
}

// The tensors must tile the data: an overlap or a hole means that some offset is a lie.
void check_tiling(const Header& header, uint64_t data_bytes, std::string_view where) {
  std::vector<const Header::value_type*> order;
  order.reserve(header.size());
  for (const auto& named : header) {
    order.push_back(&named);
  }
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  uint64_t covered = 0;
  for (const auto* named : order) {
    const HeaderTensor& tensor = named->second;
    if (tensor.begin != covered) {
      throw Error("{}: {} before tensor \"{}\": it begins at byte {}, the one before it ends at byte {}{}", where,
                  tensor.begin < covered ? "an overlap" : "a hole", printable(named->first), tensor.begin, covered,
                  HeaderReader::kRemedy);
    }
    covered = tensor.end;
  }
  if (covered != data_bytes) {
    throw Error("{}: {} bytes after the last tensor belong to none{}", where, data_bytes - covered,
                HeaderReader::kRemedy);
  }
}

std::span<const std::byte> map_file(const std::filesystem::path& path) {
  // Non-blocking, so that a pipe in place of the file is refused instead of waited for.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    throw Error("cannot open {}: {}; check --model and that the download is complete", path.string(),
                std::strerror(errno));
  }
  struct stat status {};
  const bool regular = ::fstat(fd, &status) == 0 && S_ISREG(status.st_mode);
  if (!regular || status.st_size == 0) {
    ::close(fd);
    throw Error("{} is {}; put the file of that name from the model's repository there", path.string(),
                regular ? "empty" : "not a regular file");
  }
  const auto bytes = static_cast<size_t>(status.st_size);
  void* mapped = ::mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
  const int reason = errno;
  ::close(fd);
  if (mapped == MAP_FAILED) {
    throw Error("cannot map the {} bytes of {}: {}; raise the limit on address space (ulimit -v)", bytes, path.string(),
                std::strerror(reason));
  }
  return {static_cast<const std::byte*>(mapped), bytes};
}

void unmap(std::span<const std::byte> file) {
  if (!file.empty()) {
    ::munmap(const_cast<std::byte*>(file.data()), file.size());
  }
}

}  // namespace

size_t dtype_bytes(TensorDtype dtype) {
  return entry(dtype).bytes;
}
std::string_view dtype_name(TensorDtype dtype) {
  return entry(dtype).name;
}
std::string shape_string(std::span<const int64_t> shape) {
  return fmt::format("({})", fmt::join(shape, ", "));
}

TensorMap parse_safetensors(std::span<const std::byte> file, std::string_view where) {
  const size_t length = header_bytes(file, where);
  const auto* text = reinterpret_cast<const char*>(file.data()) + kLengthBytes;
  HeaderReader reader(where);
  nlohmann::json::sax_parse(text, text + length, &reader);
  const Header header = reader.take();
  const std::span<const std::byte> data = file.subspan(kLengthBytes + length);
  for (const auto& [name, tensor] : header) {
    check_extent(name, tensor, data.size(), where);
  }
  check_tiling(header, data.size(), where);
  TensorMap tensors;
  for (const auto& [name, tensor] : header) {
    tensors.emplace(name,
                    TensorView{tensor.dtype, tensor.shape, data.subspan(tensor.begin, tensor.end - tensor.begin)});
  }
  return tensors;
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : path_(path), file_(map_file(path)) {
  try {
    tensors_ = parse_safetensors(file_, path.string());
  } catch (...) {
    unmap(file_);
    throw;
  }
}

SafetensorsFile::~SafetensorsFile() {
  unmap(file_);
}

SafetensorsFile::SafetensorsFile(SafetensorsFile&& other) noexcept
    : path_(std::move(other.path_)), file_(std::exchange(other.file_, {})), tensors_(std::move(other.tensors_)) {}

SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(file_, other.file_);
  std::swap(tensors_, other.tensors_);
  return *this;
}

const TensorView* SafetensorsFile::find(std::string_view name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

void SafetensorsFile::release(const TensorView& tensor) const {
  const auto offset = static_cast<size_t>(tensor.bytes.data() - file_.data());
  check(tensor.bytes.data() >= file_.data() && offset + tensor.bytes.size() <= file_.size(),
        "the tensor to release lies in this file");
  // Whole pages only: those at the edges are shared with the neighbours.
  const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const size_t first = (offset + page - 1) / page * page;
  const size_t last = (offset + tensor.bytes.size()) / page * page;
  if (first < last) {
    ::madvise(const_cast<std::byte*>(file_.data()) + first, last - first, MADV_DONTNEED);
  }
}

}  // namespace vericache
