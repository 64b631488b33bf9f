#include "common/serialized_layout.h"

#include <algorithm>
#include <array>

#include "common/text.h"

namespace maskmoe {
namespace {

using torch::stable::Tensor;

Tensor copy_of(const std::vector<int64_t>& values) {
  const auto count = static_cast<int64_t>(values.size());
  const int64_t step = 1;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &count, &step, aoti_torch_dtype_int64(), aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor copy(handle);
  std::copy(values.begin(), values.end(), static_cast<int64_t*>(copy.data_ptr()));
  return copy;
}

void check_serialized_layout(const std::vector<int64_t>& values, int64_t id) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(copy_of(values)), from(id)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("maskmoe::check_serialized_layout", "",
                                                      stack.data(), TORCH_ABI_VERSION));
  const auto error = torch::stable::detail::to<Text>(stack[0]);
  STD_TORCH_CHECK(error.empty(), error);
}

}  // namespace

std::vector<Layout> verified(const Contents& contents, const std::vector<int64_t>& ids) {
  std::vector<Layout> layouts;
  for (size_t n = 0; n < contents.size(); ++n) {
    check_serialized_layout(contents[n], ids[n]);
    layouts.push_back(decode({contents[n].data(), static_cast<int64_t>(contents[n].size())}));
  }
  return layouts;
}

}  // namespace maskmoe
