// The thread-local text behind kvs_last_error().

#include "failure.h"

#include <cstdarg>
#include <cstdio>

namespace kvs {

static thread_local char last_error[512] = "";

void set_last_error(const char* text) noexcept { std::snprintf(last_error, sizeof last_error, "%s", text); }

void fail(kvs_status status, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Failure(status, text);
}

}  // namespace kvs

extern "C" const char* kvs_last_error(void) { return kvs::last_error; }
