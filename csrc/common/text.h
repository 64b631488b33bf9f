// Torch's stable ABI, and a string type for the arguments of ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // as in torch 2.11's headers
#define STABLE_TORCH_ERROR_CODE_CHECK(call) STD_TORCH_CHECK((call) == 0, #call " failed")
#endif

namespace maskmoe {

// A string among an op's arguments. torch's conversion to std::string leaks it at every call
// (pytorch/pytorch#191340).
struct Text : std::string {
  using std::string::string;
};

}  // namespace maskmoe

namespace torch::stable::detail {

template <>
struct ToImpl<maskmoe::Text> {
  static maskmoe::Text call(StableIValue value, uint64_t, bool) {
    const auto handle = to<StringHandle>(value);
    size_t length;
    const char* data;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    maskmoe::Text text(data, length);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

template <>
struct FromImpl<maskmoe::Text> {
  static StableIValue call(const maskmoe::Text& text, uint64_t, bool) {
    return from(static_cast<const std::string&>(text));
  }
};

}  // namespace torch::stable::detail
