#include "source_tree.h"

#include <algorithm>
#include <array>
#include <fstream>
#include <iterator>
#include <string_view>

#include "base/error.h"
#include "text/utf8.h"

namespace vericache {
namespace {

namespace fs = std::filesystem;

constexpr std::array<std::string_view, 14> kEndings = {".py", ".c",  ".h",    ".cc", ".cpp", ".hpp", ".cu",
                                                       ".rs", ".go", ".java", ".js", ".ts",  ".jsx", ".tsx"};
constexpr size_t kMostFiles = 100'000;
constexpr uintmax_t kMostFileBytes = 1 << 20;  // longer ones are tables of data

bool is_source(const fs::path& path) {
  return std::find(kEndings.begin(), kEndings.end(), path.extension().string()) != kEndings.end();
}

// Installed packages and hidden folders are not what the tree is about.
bool is_foreign(const fs::path& folder) {
  const std::string name = folder.filename().string();
  return name.starts_with(".") || name == "site-packages" || name == "dist-packages" || name == "node_modules" ||
         name == "__pycache__";
}

std::vector<fs::path> source_files(const fs::path& root) {
  std::vector<fs::path> files;
  std::error_code failure;
  fs::recursive_directory_iterator it(root, fs::directory_options::skip_permission_denied, failure);
  for (; !failure && it != fs::recursive_directory_iterator() && files.size() < kMostFiles; it.increment(failure)) {
    if (it->is_directory(failure) && is_foreign(it->path())) {
      it.disable_recursion_pending();
    } else if (it->is_regular_file(failure) && is_source(it->path())) {
      if (const uintmax_t bytes = it->file_size(failure); !failure && bytes > 0 && bytes <= kMostFileBytes) {
        files.push_back(it->path());
      }
    }
    failure.clear();
  }
  std::sort(files.begin(), files.end());
  return files;
}

// The Python libraries of this machine, the latest version first by name, then the folder one stands in.
std::vector<fs::path> usual_places() {
  std::vector<fs::path> places;
  for (const char* lib : {"/usr/local/lib", "/usr/lib"}) {
    std::vector<fs::path> versions;
    std::error_code failure;
    for (fs::directory_iterator it(lib, failure); !failure && it != fs::directory_iterator(); it.increment(failure)) {
      if (it->path().filename().string().starts_with("python3.")) {
        versions.push_back(it->path());
      }
    }
    std::sort(versions.rbegin(), versions.rend());
    places.insert(places.end(), versions.begin(), versions.end());
  }
  places.emplace_back("src");
  return places;
}

}  // namespace

SourceTree::SourceTree(const std::string& given) {
  constexpr size_t kFewest = 20;  // of a tree that nobody named
  std::error_code failure;
  if (given.empty()) {
    for (const fs::path& place : usual_places()) {
      if (files_ = source_files(place); files_.size() >= kFewest) {
        root_ = place;
        return;
      }
    }
    throw Error("no source tree was found for the code workload: name a directory of source files with --source");
  }
  root_ = given;
  if (fs::is_directory(root_, failure)) {
    files_ = source_files(root_);
  } else if (fs::is_regular_file(root_, failure)) {
    files_ = {root_};
  } else {
    throw Error("--source '{}' is neither a directory nor a file", given);
  }
  if (files_.empty()) {
    throw Error("--source '{}' holds no source files ({}, ...)", given, kEndings.front());
  }
}

std::vector<TokenId> SourceTree::document(const Tokenizer& tokenizer, int tokens, int index, int count) const {
  // The bundled models know this as the beginning of a file; another tokenizer would spell it out.
  const bool marked = tokenizer.token_id("<|file|>").has_value();
  const size_t wanted = static_cast<size_t>(tokens);
  const size_t first = files_.size() * static_cast<size_t>(index) / static_cast<size_t>(count);
  std::vector<TokenId> ids;
  for (size_t i = 0; i < files_.size() && ids.size() < wanted; ++i) {
    const fs::path& path = files_[(first + i) % files_.size()];
    std::ifstream in(path, std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
    if (text.empty() || find_invalid_utf8(text) != std::string_view::npos) {
      continue;
    }
    const std::string name = path == root_ ? path.filename().string() : path.lexically_relative(root_).string();
    const std::string head = marked ? "<|file|>" + name + "\n" : "";
    const std::vector<TokenId> more = tokenizer.encode(head + text, ids.empty());
    ids.insert(ids.end(), more.begin(), more.end());
  }
  if (ids.size() < wanted) {
    throw Error("{} has {} tokens of source, too few for a context of {}: name a larger tree with --source",
                root_.string(), ids.size(), tokens);
  }
  ids.resize(wanted);
  return ids;
}

}  // namespace vericache
