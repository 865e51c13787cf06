// Events and waiting: kvs_event_*, kvs_record, kvs_stream_wait, kvs_wait, kvs_post.

#include "device.h"

using kvs::checked;
using kvs::guard;
using kvs::require;

namespace kvs {

/** Records on a stream that has room. */
void push_record(kvs_device& device, Stream& stream, uint32_t event, bool is_watched) {
  const uint64_t ticket = device.events.begin(event);
  const auto record = [&device, &stream, event, ticket, is_watched] {
    device.events.finish(event, ticket, stream.status());
    if (is_watched) device.wake->post();
  };
  stream.push(record, true);
}

}  // namespace kvs

extern "C" {

kvs_status kvs_event_create(kvs_device* device, uint32_t* event) {
  return guard([&] {
    kvs_device& d = checked(device);
    require(event != nullptr, "event must not be null");
    *event = d.events.create();
  });
}

kvs_status kvs_record(kvs_device* device, kvs_stream stream, uint32_t event, uint32_t watch) {
  return guard([&] {
    kvs_device& d = checked(device);
    kvs::Stream& s = d.stream(stream);
    require(d.events.exists(event), "no event %u", event);
    if (!s.has_room()) {
      kvs::set_last_error("the stream's queue is full");
      return KVS_BUSY;
    }
    kvs::push_record(d, s, event, watch != 0);
    return KVS_OK;
  });
}

kvs_status kvs_stream_wait(kvs_device* device, kvs_stream stream, uint32_t event) {
  return guard([&] {
    kvs_device& d = checked(device);
    kvs::Stream& s = d.stream(stream);
    require(d.events.exists(event), "no event %u", event);
    const uint64_t ticket = d.events.latest(event);
    return kvs::enqueue(s, [&d, &s, event, ticket] {
      const kvs_status status = d.events.wait(event, ticket);
      if (status != KVS_OK) s.set_status(status);
    });
  });
}

kvs_status kvs_event_query(kvs_device* device, uint32_t event) {
  return guard([&] {
    kvs_device& d = checked(device);
    require(d.events.exists(event), "no event %u", event);
    const kvs_status status = d.events.query(event);
    if (status < 0) kvs::set_last_error("an operation before this event failed");
    return status;
  });
}

kvs_status kvs_wait(kvs_device* device, uint32_t timeout_us) {
  return guard([&] { return checked(device).wake->wait(timeout_us) ? KVS_OK : KVS_TIMEOUT; });
}

kvs_status kvs_post(kvs_device* device) {
  return guard([&] { checked(device).wake->post(); });
}

}  // extern "C"
