#include "files.h"

#include <fstream>

#include "actserve/policy.h"
#include "sha256.h"

namespace actserve {

std::string read_verified(const std::string& folder, const File& file) {
  const std::string path = folder + "/" + file.path;
  std::ifstream stream(path, std::ios::binary | std::ios::ate);
  if (!stream) throw Error(path + ": cannot be read");
  const auto bytes = static_cast<std::size_t>(stream.tellg());
  if (bytes != file.bytes) {
    throw Error(path + ": expected " + std::to_string(file.bytes) + " bytes; got " + std::to_string(bytes));
  }
  std::string data(bytes, '\0');
  stream.seekg(0);
  if (!stream.read(&data[0], static_cast<std::streamsize>(bytes))) throw Error(path + ": cannot be read");
  const std::string digest = hexadecimal(sha256(data.data(), data.size()));
  if (digest != file.sha256) throw Error(path + ": expected the SHA-256 " + file.sha256 + "; got " + digest);
  return data;
}

}  // namespace actserve
