#include "kv/disk_store.h"

#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <limits>
#include <system_error>

#include "base/error.h"

namespace vericache {
namespace {

std::string reason(int error) {
  return std::generic_category().message(error);
}

// The file is unlinked as soon as it is open: it goes with the last descriptor, however the process ends.
int open_unnamed(const std::string& directory) {
  std::string path = directory + "/vericache-blocks-XXXXXX";
  const int file = mkostemp(path.data(), O_CLOEXEC);
  if (file < 0) {
    throw Error("block store: no file can be made in '{}' ({}); name a directory that exists and can be written",
                directory, reason(errno));
  }
  unlink(path.c_str());
  return file;
}

// The file is sparse, so that nothing is written before it is needed; but that it fits is known from the start.
void make_room(int file, const std::string& directory, size_t block_bytes, int blocks) {
  const auto count = static_cast<size_t>(blocks);
  if (count > 0 && block_bytes > static_cast<size_t>(std::numeric_limits<off_t>::max()) / count) {
    throw Error("block store: {} blocks of {} bytes are more than a file holds; give a smaller size", blocks,
                block_bytes);
  }
  const size_t bytes = block_bytes * count;
  struct statvfs disk {};
  if (fstatvfs(file, &disk) != 0) {
    throw Error("block store: the room in '{}' is unknown ({})", directory, reason(errno));
  }
  const double room = static_cast<double>(disk.f_bavail) * static_cast<double>(disk.f_frsize);
  if (static_cast<double>(bytes) > room) {
    throw Error(
        "block store: '{}' has {:.1f} GB of room and {:.1f} GB are asked for; give a smaller size, or another "
        "directory",
        directory, room / 1e9, static_cast<double>(bytes) / 1e9);
  }
  if (ftruncate(file, static_cast<off_t>(bytes)) != 0) {
    throw Error(
        "block store: a file of {} bytes cannot be made in '{}' ({}); give a smaller size, or another directory", bytes,
        directory, reason(errno));
  }
}

// `move(done)` transfers what it can from there on. 0, or the error; a file that ends early is one of input or output.
template <typename Move>
int transfer(size_t bytes, const Move& move) {
  size_t done = 0;
  while (done < bytes) {
    const ssize_t moved = move(done);
    if (moved > 0) {
      done += static_cast<size_t>(moved);
    } else if (moved == 0) {
      return EIO;
    } else if (errno != EINTR) {
      return errno;
    }
  }
  return 0;
}

}  // namespace

DiskStore::DiskStore(const std::string& directory, size_t block_bytes, int blocks)
    : BlockStore(block_bytes, blocks),
      name_("disk " + directory),
      file_(open_unnamed(directory)),
      reading_(name_ + ": reading"),
      writing_(name_ + ": writing") {
  try {
    make_room(file_, directory, block_bytes, blocks);
  } catch (...) {
    close(file_);
    throw;
  }
}

DiskStore::~DiskStore() {
  close(file_);
}

bool DiskStore::read(int block, size_t offset, std::span<std::byte> to) {
  check_place(block, offset, to.size());
  if (!holds(block, offset + to.size())) {
    return false;
  }
  const int error = transfer(to.size(), [&](size_t done) {
    return pread(file_, to.data() + done, to.size() - done, position(block, offset + done));
  });
  return error == 0 ? reading_.worked() : reading_.failed(reason(error));
}

bool DiskStore::write(int block, size_t offset, std::span<const std::byte> from) {
  check_place(block, offset, from.size());
  if (from.empty()) {
    return true;
  }
  const int error = transfer(from.size(), [&](size_t done) {
    return pwrite(file_, from.data() + done, from.size() - done, position(block, offset + done));
  });
  if (error != 0) {
    return writing_.failed(reason(error));
  }
  wrote(block, offset + from.size());
  return writing_.worked();
}

// Best effort: where a file cannot have holes its room stays taken, and the next owner writes over it.
void DiskStore::forget(int block) {
  (void)fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, position(block, 0),
                  static_cast<off_t>(block_bytes()));
}

}  // namespace vericache
