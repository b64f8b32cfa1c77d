#include "base/trace.h"

#include <fmt/format.h>

#include "base/error.h"

namespace vericache {

Trace::Trace(const std::filesystem::path& path) : file_(path) {
  if (!file_) {
    throw Error("the trace {} cannot be written: give a path in a folder that exists", path.string());
  }
  file_ << "[";
}

Trace::~Trace() {
  file_ << "\n]\n";
}

void Trace::span(std::string_view lane, std::string_view name, double begin, double end) {
  const std::lock_guard lock(mutex_);
  auto known = lanes_.find(lane);
  if (known == lanes_.end()) {
    known = lanes_.emplace(lane, static_cast<int>(lanes_.size()) + 1).first;
    event(fmt::format(R"({{"ph":"M","pid":1,"tid":{},"name":"thread_name","args":{{"name":"{}"}}}})", known->second,
                      lane));
  }
  event(fmt::format(R"({{"ph":"X","pid":1,"tid":{},"name":"{}","ts":{:.3f},"dur":{:.3f}}})", known->second, name,
                    begin * 1e6, (end - begin) * 1e6));
}

void Trace::event(const std::string& json) {
  file_ << (first_ ? "\n" : ",\n") << json;
  first_ = false;
}

}  // namespace vericache
