// As a library: vitfast_host_launch for tensors of this process. As a program: one launch that a
// file describes, for sanitizers, which have to be there from a process's start:
//   host CASE RESULT
// CASE: name, numbers of the launch, the arguments, which of their bytes are addresses of buffers,
// and the buffers; RESULT: the buffers afterwards. tests/cuda/running.py writes and reads them.
#include "../../../csrc/cuda/intrinsics.h"

#include <cstdio>
#include <exception>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <vector>

extern "C" const char* vitfast_host_launch(const char* name, std::int64_t blocks, int threads,
                                           std::int64_t shared_bytes, const void* arguments,
                                           std::int64_t size) {
  static std::string error;
  try {
    vitfast::host::launch(name, blocks, threads, static_cast<std::size_t>(shared_bytes), arguments,
                          static_cast<std::size_t>(size));
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

#if defined(VITFAST_HOST_PROGRAM)
namespace {

std::int64_t read_number(std::istream& in) {
  std::int64_t n = 0;
  in.read(reinterpret_cast<char*>(&n), sizeof n);
  if (!in) throw std::runtime_error("the case ends early");
  return n;
}
std::string read_bytes(std::istream& in, std::int64_t size) {
  std::string bytes(static_cast<std::size_t>(size), '\0');
  in.read(&bytes[0], size);
  if (!in) throw std::runtime_error("the case ends early");
  return bytes;
}

}  // namespace

int main(int count, char** given) {
  if (count != 3) return std::fprintf(stderr, "usage: host CASE RESULT\n"), 2;
  try {
    std::ifstream in(given[1], std::ios::binary);
    const std::string name = read_bytes(in, read_number(in));
    const std::int64_t blocks = read_number(in), threads = read_number(in),
                       shared = read_number(in);
    std::string arguments = read_bytes(in, read_number(in));
    struct Address {
      std::int64_t at, buffer, offset;
    };
    std::vector<Address> addresses(static_cast<std::size_t>(read_number(in)));
    for (Address& a : addresses) a = {read_number(in), read_number(in), read_number(in)};
    std::vector<std::unique_ptr<char[]>> buffers;
    std::vector<std::int64_t> sizes(static_cast<std::size_t>(read_number(in)));
    for (std::int64_t& size : sizes) {
      size = read_number(in);
      const std::string bytes = read_bytes(in, size);
      buffers.emplace_back(new char[bytes.size()]);
      std::memcpy(buffers.back().get(), bytes.data(), bytes.size());
    }
    for (const Address& a : addresses) {
      const char* p = buffers[static_cast<std::size_t>(a.buffer)].get() + a.offset;
      std::memcpy(&arguments[static_cast<std::size_t>(a.at)], &p, sizeof p);
    }
    vitfast::host::launch(name, blocks, static_cast<int>(threads), static_cast<std::size_t>(shared),
                          arguments.data(), arguments.size());
    std::ofstream out(given[2], std::ios::binary);
    for (std::size_t i = 0; i < buffers.size(); ++i) out.write(buffers[i].get(), sizes[i]);
    return out.good() ? 0 : 3;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
#endif
