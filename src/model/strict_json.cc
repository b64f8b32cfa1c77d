#include "model/strict_json.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <unordered_set>
#include <vector>

#include "base/error.h"

namespace vericache {
namespace {

constexpr size_t kMaxDepth = 32;

// Watches the parser: one set of seen keys per open object or array.
class Watcher {
 public:
  explicit Watcher(std::string_view where) : where_(where) {}

  bool operator()(int, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    using Event = nlohmann::json::parse_event_t;
    switch (event) {
      case Event::object_start:
      case Event::array_start:
        if (open_.size() >= kMaxDepth) {
          throw Error("{}: JSON nested deeper than {} levels; no model file needs that, download it again", where_,
                      kMaxDepth);
        }
        open_.emplace_back();
        break;
      case Event::object_end:
      case Event::array_end:
        open_.pop_back();
        break;
      case Event::key: {
        const auto& key = parsed.get_ref<const std::string&>();
        if (!open_.back().insert(key).second) {
          throw Error("{}: the key \"{}\" appears twice in one object; remove one of them", where_, printable(key));
        }
        break;
      }
      case Event::value:
        break;
    }
    return true;
  }

 private:
  std::string_view where_;
  std::vector<std::unordered_set<std::string>> open_;
};

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) {
      ::close(fd_);
    }
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int value() const { return fd_; }

 private:
  int fd_;
};

}  // namespace

nlohmann::json parse_strict_json(std::string_view text, std::string_view where) {
  try {
    Watcher watcher(where);
    const nlohmann::json::parser_callback_t watch = [&](int depth, nlohmann::json::parse_event_t event,
                                                        nlohmann::json& parsed) {
      return watcher(depth, event, parsed);
    };
    return nlohmann::json::parse(text.begin(), text.end(), watch);
  } catch (const nlohmann::json::exception& e) {
    throw Error("{}: not valid JSON ({}); download it again", where, printable(e.what(), 240));
  }
}

std::string read_text_file(const std::filesystem::path& path, size_t max_bytes) {
  // Non-blocking, so that a pipe in place of the file is refused instead of waited for.
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (file.value() < 0) {
    throw Error("cannot open {}: {}", path.string(), std::strerror(errno));
  }
  struct stat status {};
  if (::fstat(file.value(), &status) != 0 || !S_ISREG(status.st_mode)) {
    throw Error("{} is not a regular file; put the file of that name from the model's repository there", path.string());
  }
  if (static_cast<uint64_t>(status.st_size) > max_bytes) {
    throw Error("{} has {} bytes, more than the {} such a file may have; download it again", path.string(),
                status.st_size, max_bytes);
  }
  std::string text(static_cast<size_t>(status.st_size), '\0');
  size_t got = 0;
  while (got < text.size()) {
    const ssize_t n = ::read(file.value(), text.data() + got, text.size() - got);
    if (n < 0 && errno == EINTR) {
      continue;
    }
    if (n <= 0) {
      throw Error("cannot read {}: {}", path.string(), n < 0 ? std::strerror(errno) : "it shrank while being read");
    }
    got += static_cast<size_t>(n);
  }
  return text;
}

std::string printable(std::string_view text, size_t max_chars) {
  std::string out;
  for (const char c : text.substr(0, max_chars)) {
    if (c >= 0x20 && c < 0x7f) {
      out += c;
    } else {
      out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    }
  }
  if (text.size() > max_chars) {
    out += "...";
  }
  return out;
}

}  // namespace vericache
