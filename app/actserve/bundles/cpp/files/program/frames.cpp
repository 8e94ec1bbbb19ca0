#include "frames.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <system_error>

namespace actserve {
namespace {

using namespace signature;

enum Flag : std::uint8_t { kReset = 1, kRandom = 2, kSeed = 4, kCount = 8, kParameters = 16, kShared = 32, kAll = 63 };

constexpr std::size_t item_bytes() {
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < observation_count; ++i) bytes += inputs[i].bytes();
  return bytes;
}

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

// Reads small parts through a buffer, and large ones straight to their place.
class Reader {
 public:
  explicit Reader(int descriptor) : descriptor_(descriptor) {}

  // False at the end of the input.
  bool read(void* to, std::size_t bytes) {
    auto* place = static_cast<char*>(to);
    while (bytes > 0) {
      if (begin_ == end_ && bytes < sizeof buffer_) {
        begin_ = 0;
        end_ = some(buffer_, sizeof buffer_);
        if (end_ == 0) return false;
      }
      std::size_t got = std::min(bytes, end_ - begin_);
      if (got > 0) {
        std::memcpy(place, buffer_ + begin_, got);
        begin_ += got;
      } else if ((got = some(place, bytes)) == 0) {
        return false;
      }
      place += got;
      bytes -= got;
    }
    return true;
  }

  bool skip(std::size_t bytes) {
    char unread[4096];
    for (; bytes > 0; bytes -= std::min(bytes, sizeof unread)) {
      if (!read(unread, std::min(bytes, sizeof unread))) return false;
    }
    return true;
  }

  // Whether the input ended before the first byte of a frame.
  bool at_end() {
    if (begin_ == end_) {
      begin_ = 0;
      end_ = some(buffer_, sizeof buffer_);
    }
    return end_ == 0;
  }

 private:
  std::size_t some(void* to, std::size_t bytes) {
    while (true) {
      const ssize_t got = ::read(descriptor_, to, bytes);
      if (got >= 0) return static_cast<std::size_t>(got);
      if (errno != EINTR) fail("cannot read the input");
    }
  }

  int descriptor_;
  std::size_t begin_ = 0, end_ = 0;
  char buffer_[512];
};

template <std::size_t N>
void write_all(int descriptor, std::array<iovec, N> parts, std::size_t count) {
  iovec* part = parts.data();
  while (count > 0) {
    const ssize_t done = ::writev(descriptor, part, static_cast<int>(count));
    if (done < 0 && errno != EINTR) fail("cannot write the output");
    for (auto left = static_cast<std::size_t>(std::max<ssize_t>(done, 0)); count > 0;) {
      const std::size_t taken = std::min(left, part->iov_len);
      part->iov_base = static_cast<char*>(part->iov_base) + taken;
      part->iov_len -= taken;
      left -= taken;
      if (part->iov_len > 0) break;
      ++part, --count;
    }
  }
}

struct Header {
  std::uint32_t bytes;  // of what follows
  std::uint8_t status;
} __attribute__((packed));

class Connection {
 public:
  Connection(Policy& policy, Episode& episode, int in, int out, std::size_t outputs, Shared shared)
      : policy_(policy), episode_(episode), reader_(in), out_(out), outputs_(outputs), shared_(shared) {}

  // False if the input ends in the middle of a frame.
  bool serve() {
    while (!reader_.at_end()) {
      if (!answer()) return false;
    }
    return true;
  }

 private:
  bool answer() {
    std::uint32_t bytes;
    if (!reader_.read(&bytes, sizeof bytes)) return false;
    left_ = bytes;
    try {
      if (!step()) return false;
    } catch (const Error& error) {
      if (!reader_.skip(left_)) return false;
      const std::string message = error.what();
      std::array<iovec, 2> parts;
      const Header header{static_cast<std::uint32_t>(1 + message.size()), 1};
      parts[0] = {const_cast<Header*>(&header), sizeof header};
      parts[1] = {const_cast<char*>(message.data()), message.size()};
      write_all(out_, parts, 2);
      return true;
    }
    reply();
    return true;
  }

  bool take(void* to, std::size_t bytes) {
    if (left_ < bytes) {
      throw InvalidInput("expected " + std::to_string(bytes) + " more bytes in the frame; got " + std::to_string(left_));
    }
    left_ -= bytes;
    return reader_.read(to, bytes);
  }

  bool step() {
    Options options;
    std::uint8_t flags;
    if (!take(&flags, sizeof flags)) return false;
    if (flags & ~kAll) throw InvalidInput("expected flags of 0 to 63; got " + std::to_string(flags));
    if (flags & kRandom) options.exploration = Exploration::random;
    if (flags & kSeed) {
      if (!take(&options.seed.emplace(), sizeof(std::uint64_t))) return false;
    }
    std::uint32_t count = 1;
    if ((flags & kCount) && !take(&count, sizeof count)) return false;
    if (flags & kParameters) {
      auto values = options.parameters.values();
      if (!take(values.data(), values.size() * sizeof(float))) return false;
      options.parameters.assign(values);
    }
    const bool shared = flags & kShared;
    if (left_ != (shared ? 0 : count * item_bytes())) {
      throw InvalidInput("expected " + std::to_string(count) + " x " + std::to_string(shared ? 0 : item_bytes()) +
                         " bytes of observations; got " + std::to_string(left_));
    }
    if (shared && shared_.bytes < shared_offset(observation_count, count)) {
      throw InvalidInput("expected shared memory of " + std::to_string(shared_offset(observation_count, count)) +
                         " bytes (--shared FILE); got " + std::to_string(shared_.bytes));
    }
    policy_.prepare(count);
    for (std::size_t i = 0; i < observation_count; ++i) {
      if (shared) {
        policy_.observe(i, shared_.memory + shared_offset(i, count));
      } else if (!take(policy_.observation(i), count * inputs[i].bytes())) {
        return false;
      }
    }
    policy_.finish(options, &episode_, flags & kReset);
    count_ = count;
    return true;
  }

  void reply() {
    std::array<iovec, 1 + output_count> parts;
    Header header{1, 0};
    for (std::size_t i = 0; i < outputs_; ++i) {
      parts[1 + i] = {const_cast<void*>(policy_.output(i)), count_ * results[i].bytes()};
      header.bytes += static_cast<std::uint32_t>(parts[1 + i].iov_len);
    }
    parts[0] = {&header, sizeof header};
    write_all(out_, parts, 1 + outputs_);
  }

  Policy& policy_;
  Episode& episode_;
  Reader reader_;
  int out_;
  std::size_t outputs_;   // so many of them are in an answer
  Shared shared_;
  std::size_t left_ = 0;  // bytes of the frame that have not been read
  std::size_t count_ = 0;
};

}  // namespace

Shared map(const char* path) {
  const int descriptor = ::open(path, O_RDONLY | O_CLOEXEC);
  struct stat status;
  if (descriptor < 0 || ::fstat(descriptor, &status) != 0) fail(path);
  const auto bytes = static_cast<std::size_t>(status.st_size);
  void* memory = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, descriptor, 0);
  if (memory == MAP_FAILED) fail(path);
  ::close(descriptor);
  return {static_cast<const unsigned char*>(memory), bytes};
}

std::size_t shared_offset(std::size_t index, std::size_t count) {
  std::size_t offset = 0;
  for (std::size_t i = 0; i < index; ++i) offset += (count * inputs[i].bytes() + 63) / 64 * 64;
  return offset;
}

bool serve(Policy& policy, Episode& episode, int in, int out, bool all_outputs, Shared shared) {
#ifdef F_SETPIPE_SZ
  // A whole frame fits into the pipe, so that it is read at once. Not every input is a pipe.
  fcntl(in, F_SETPIPE_SZ, static_cast<int>(std::min<std::size_t>(2 * item_bytes() + 4096, 1 << 20)));
#endif
  return Connection(policy, episode, in, out, all_outputs ? output_count : 1, shared).serve();
}

}  // namespace actserve
