// How a C++ failure becomes a kvs_status: throw Failure inside, wrap every extern "C" entry in guard().
// The text lands in this thread's kvs_last_error().

#pragma once

#include <exception>
#include <new>
#include <string>
#include <utility>

#include "../kvasir.h"

namespace kvs {

class Failure : public std::exception {
 public:
  Failure(kvs_status status, std::string message) : status_(status), message_(std::move(message)) {}
  kvs_status status() const noexcept { return status_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  kvs_status status_;
  std::string message_;
};

void set_last_error(const char* text) noexcept;

[[noreturn]] void fail(kvs_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

/** Argument check: KVS_INVALID with this text unless `condition`. The text is formatted only on failure. */
template <class... Values>
inline void require(bool condition, const char* format, Values... values) {
  if (__builtin_expect(!condition, 0)) {
    if constexpr (sizeof...(Values) == 0) {
      fail(KVS_INVALID, "%s", format);
    } else {
      fail(KVS_INVALID, format, values...);
    }
  }
}

/** Runs `body` (returning kvs_status or nothing); no exception passes. */
template <class Body>
kvs_status guard(Body&& body) noexcept {
  try {
    if constexpr (std::is_void_v<decltype(body())>) {
      body();
      return KVS_OK;
    } else {
      return body();
    }
  } catch (const Failure& failure) {
    set_last_error(failure.what());
    return failure.status();
  } catch (const std::bad_alloc&) {
    set_last_error("out of memory");
    return KVS_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    set_last_error(error.what());
    return KVS_DEVICE_FAILED;
  } catch (...) {
    set_last_error("unknown native failure");
    return KVS_DEVICE_FAILED;
  }
}

}  // namespace kvs
