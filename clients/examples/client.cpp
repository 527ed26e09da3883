// Stream counts through a running service: one file, libzmq and msgpack alone.
//
// Debian: apt-get install g++ libzmq3-dev libmsgpack-cxx-dev
// Build:  g++ -std=c++17 -O2 -DMSGPACK_NO_BOOST client.cpp -o client -lzmq
// Run:    ./client tcp://127.0.0.1:5555 counts.csv     (a line a bin, a column a unit)
//
// Prints a line for each bin: its index, its status, and what is decoded.

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <msgpack.hpp>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>
#include <zmq.h>

namespace {

constexpr int wait_ms = 5000;
using Buffer = msgpack::sbuffer;
using Packer = msgpack::packer<Buffer>;

std::int64_t monotonic_ns() {
  using namespace std::chrono;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

/// The value of a key. Fields that are not asked for are ignored: the protocol grows by them.
const msgpack::object& at(const msgpack::object& map, const char* key) {
  if (map.type != msgpack::type::MAP) throw std::runtime_error("expected a map");
  for (const auto& entry : map.via.map)
    if (entry.key.as<std::string>() == key) return entry.val;
  throw std::runtime_error(std::string("no field ") + key);
}

std::string text(const msgpack::object& map, const char* key) { return at(map, key).as<std::string>(); }

/// The next message: of several frames the last, those before are the topic.
msgpack::object_handle receive(void* socket, const char* what) {
  zmq_pollitem_t item{socket, 0, ZMQ_POLLIN, 0};
  if (zmq_poll(&item, 1, wait_ms) < 1)
    throw std::runtime_error(std::string("no ") + what + " within 5 s: is the service running?");
  std::string frame;
  int more = 1;
  while (more) {
    zmq_msg_t part;
    zmq_msg_init(&part);
    if (zmq_msg_recv(&part, socket, 0) < 0) throw std::runtime_error(zmq_strerror(errno));
    frame.assign(static_cast<char*>(zmq_msg_data(&part)), zmq_msg_size(&part));
    more = zmq_msg_more(&part);
    zmq_msg_close(&part);
  }
  auto message = msgpack::unpack(frame.data(), frame.size());
  if (text(message.get(), "type") == "refused")
    throw std::runtime_error(text(message.get(), "field") + ": expected " +
                             text(message.get(), "expected") + ", got " + text(message.get(), "got"));
  return message;
}

/// The next message of a type; notices, credits and types that are not known are passed over.
msgpack::object_handle receive_type(void* socket, const std::string& type, const char* what) {
  while (true) {
    auto message = receive(socket, what);
    if (text(message.get(), "type") == type) return message;
  }
}

void send(void* socket, const Buffer& message) {
  if (zmq_send(socket, message.data(), message.size(), 0) < 0)
    throw std::runtime_error(zmq_strerror(errno));
}

template <typename Value>
void field(Packer& out, const char* key, const Value& value) {
  out.pack(std::string(key));
  out.pack(value);
}

/// Counts as the wire has them: little-endian uint16 beside their type and shape.
void pack_counts(Packer& out, const std::vector<std::uint16_t>& counts) {
  std::string bytes;
  for (auto count : counts) {
    bytes.push_back(static_cast<char>(count & 0xff));
    bytes.push_back(static_cast<char>(count >> 8));
  }
  out.pack(std::string("counts"));
  out.pack_map(3);
  field(out, "dtype", std::string("<u2"));
  field(out, "shape", std::vector<std::size_t>{counts.size()});
  out.pack(std::string("data"));
  out.pack_bin(static_cast<std::uint32_t>(bytes.size()));
  out.pack_bin_body(bytes.data(), static_cast<std::uint32_t>(bytes.size()));
}

std::vector<double> doubles(const msgpack::object& array) {
  const auto& data = at(array, "data").via.bin;
  std::vector<double> values(data.size / sizeof(double));  // "<f8": this machine is little-endian
  std::memcpy(values.data(), data.ptr, data.size);
  return values;
}

std::vector<std::vector<std::uint16_t>> read_counts(const char* path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(std::string("cannot read ") + path);
  std::vector<std::vector<std::uint16_t>> bins;
  for (std::string line; std::getline(file, line);) {
    std::vector<std::uint16_t> counts;
    std::stringstream cells(line);
    for (std::string cell; std::getline(cells, cell, ',');)
      counts.push_back(static_cast<std::uint16_t>(std::stoul(cell)));
    bins.push_back(counts);
  }
  return bins;
}

void run(const char* endpoint, const char* path) {
  const auto bins = read_counts(path);
  const std::string name = "cpp";
  const std::int64_t epoch = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  void* context = zmq_ctx_new();
  void* dealer = zmq_socket(context, ZMQ_DEALER);
  void* sub = zmq_socket(context, ZMQ_SUB);
  const int no_linger = 0;
  zmq_setsockopt(dealer, ZMQ_LINGER, &no_linger, sizeof no_linger);
  if (zmq_connect(dealer, endpoint)) throw std::runtime_error(std::string("not an address: ") + endpoint);

  Buffer describe;
  Packer out(describe);
  out.pack_map(1);
  field(out, "type", std::string("describe"));
  send(dealer, describe);
  const auto described = receive_type(dealer, "described", "description");
  const auto& manifest = at(described.get(), "manifest");
  const auto units = at(manifest, "unit_names").as<std::vector<std::string>>();
  const auto bin_ns = static_cast<std::int64_t>(at(manifest, "bin_width").as<double>() * 1e9 + 0.5);

  zmq_connect(sub, text(described.get(), "results").c_str());
  const std::string topic = name + '\0';
  zmq_setsockopt(sub, ZMQ_SUBSCRIBE, topic.data(), topic.size());
  receive(sub, "subscription");  // from here on no result is missed

  Buffer open;
  Packer request(open);
  request.pack_map(7);
  field(request, "type", std::string("open"));
  field(request, "protocol", 2);
  field(request, "session", name);
  field(request, "epoch", epoch);
  field(request, "units", units);
  field(request, "bin_width_ns", bin_ns);
  field(request, "deadline_ns", 0);
  send(dealer, open);
  receive_type(dealer, "opened", "answer to open");

  for (std::size_t index = 0; index < bins.size(); ++index) {
    Buffer bin;
    Packer counts(bin);
    counts.pack_map(6);
    field(counts, "type", std::string("bin"));
    field(counts, "session", name);
    field(counts, "epoch", epoch);
    field(counts, "index", index);
    field(counts, "source_ns", monotonic_ns());
    pack_counts(counts, bins[index]);
    send(dealer, bin);
    const auto result = receive_type(sub, "result", "answer to a bin");
    std::printf("%zu %s", index, text(result.get(), "status").c_str());
    for (double value : doubles(at(result.get(), "kinematics"))) std::printf(" %.17g", value);
    std::printf("\n");
  }

  Buffer close;
  Packer end(close);
  end.pack_map(3);
  field(end, "type", std::string("close"));
  field(end, "session", name);
  field(end, "epoch", epoch);
  send(dealer, close);
  receive_type(dealer, "closed", "confirmation");
  zmq_close(dealer);
  zmq_close(sub);
  zmq_ctx_term(context);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: client ENDPOINT COUNTS.csv\n");
    return 2;
  }
  try {
    run(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
