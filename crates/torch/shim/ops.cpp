// What libtorch has and its Rust binding has not: attention over packed sequences, AdamW in one pass, tensors that keep the
// memory that they lie in, memory of the host that a GPU reads by itself, copies beside its work, and what tensors take of
// its memory.
//
// Tensors come and go as pointers to at::Tensor, as in torch-sys; what is returned belongs to the caller. A function returns
// null, or the text of an error, which learn_torch_free takes. No exception leaves this file.

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_efficient_attention_forward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace {

// of _efficient_attention_forward: key j is seen by queries from j on
constexpr int64_t CAUSAL = 1;

char no_text[] = "there is no memory for the error's text";

char* copied(const char* text) {
  char* copy = strdup(text);
  return copy != nullptr ? copy : no_text;
}

template <typename Work>
char* guarded(Work work) {
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    return copied(error.what());
  } catch (...) {
    return copied("an exception without a text");
  }
}

std::vector<at::Tensor> tensors(const at::Tensor* const* list, size_t count) {
  std::vector<at::Tensor> all;
  all.reserve(count);
  for (size_t number = 0; number < count; ++number) {
    all.push_back(*list[number]);
  }
  return all;
}

// The stream by which copies come to this GPU. There is one, because memory is used again by the stream that it was made
// for.
c10::Stream copies(c10::Device device) {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, c10::Stream> streams;
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = streams.find(device.index());
  if (found == streams.end()) {
    const c10::impl::VirtualGuardImpl gpu(device.type());
    found = streams.emplace(device.index(), gpu.getStreamFromGlobalPool(device)).first;
  }
  return found->second;
}

// A tensor on its way to a GPU.
struct Copy {
  at::Tensor there;
  c10::Event copied;
};

}  // namespace

extern "C" {

void learn_torch_free(char* text) {
  if (text != no_text) {
    std::free(text);
  }
}

// Without cuDNN's attention, which makes a plan for each new shape: batches of texts hardly have one twice.
char* learn_cuda_loaded() {
  return guarded([] { at::globalContext().setSDPUseCuDNN(false); });
}

// Causal attention of each sequence on itself: query, key and value [T, heads, width]; bounds [B + 1] i32. bf16 by flash
// attention; f16 and f32 by kernels that also older GPUs have.
char* learn_packed_attention(const at::Tensor* query, const at::Tensor* key, const at::Tensor* value,
                             const at::Tensor* bounds, int64_t longest, double dropout, at::Tensor** out) {
  return guarded([&] {
    at::Tensor attended;
    if (query->scalar_type() == at::kBFloat16) {
      attended = std::get<0>(at::_flash_attention_forward(*query, *key, *value, *bounds, *bounds, longest, longest,
                                                          dropout, /*is_causal=*/true, /*return_debug_mask=*/false));
    } else {
      attended = std::get<0>(at::_efficient_attention_forward(
          query->unsqueeze(0), key->unsqueeze(0), value->unsqueeze(0), /*bias=*/std::nullopt, *bounds, *bounds, longest,
          longest, dropout, CAUSAL, /*compute_log_sumexp=*/true));
      attended = attended.squeeze(0);
    }
    *out = new at::Tensor(std::move(attended));
  });
}

// One update of `count` tensors. `step` is f32 [], the number of this update counted from 1.
char* learn_fused_adamw(const at::Tensor* const* values, const at::Tensor* const* gradients,
                        const at::Tensor* const* first, const at::Tensor* const* second, size_t count,
                        const at::Tensor* step, double learning_rate, double beta1, double beta2, double weight_decay,
                        double epsilon) {
  return guarded([&] {
    at::_fused_adamw_(tensors(values, count), tensors(gradients, count), tensors(first, count),
                      tensors(second, count), /*max_exp_avg_sqs=*/{}, std::vector<at::Tensor>(count, *step),
                      learning_rate, beta1, beta2, weight_decay, epsilon, /*amsgrad=*/false, /*maximize=*/false);
    // the operator does not tell autograd, nor whoever keeps copies, that these have changed
    for (size_t number = 0; number < count; ++number) {
      values[number]->unsafeGetTensorImpl()->bump_version();
    }
  });
}

// [count] f32 over memory of the host, which is there until `release` is called with `holder`: once, after the last tensor
// over it, or when there is an error.
char* learn_tensor_over(float* start, int64_t count, void* holder, void (*release)(void*), at::Tensor** out) {
  return guarded([&] {
    at::Tensor tensor = at::for_blob(start, at::IntArrayRef(&count, 1))
                            .context(holder, release)
                            .options(at::TensorOptions().dtype(at::kFloat))
                            .make_tensor();
    *out = new at::Tensor(std::move(tensor));
  });
}

// [count] of this c10::ScalarType in page-locked memory, with whatever lies there. It is used again when copies from it
// have ended.
char* learn_page_locked(int64_t count, int kind, at::Tensor** out) {
  return guarded([&] {
    auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(kind)).pinned_memory(true);
    *out = new at::Tensor(at::empty({count}, options));
  });
}

// Begins to copy a tensor in page-locked memory to a GPU, beside what that is doing. Whoever has the copy calls one of the
// next two, once.
char* learn_copy_begin(const at::Tensor* host, int ordinal, Copy** copy) {
  return guarded([&] {
    const c10::Device device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(ordinal));
    const c10::StreamGuard guard(copies(device));
    at::Tensor there = host->to(device, /*non_blocking=*/true);
    c10::Event copied(device.type());
    copied.record(guard.current_stream());
    *copy = new Copy{std::move(there), std::move(copied)};
  });
}

// The tensor on the GPU: what this thread enqueues from now on comes after the copy.
char* learn_copy_end(Copy* copy, at::Tensor** out) {
  return guarded([&] {
    const std::unique_ptr<Copy> ended(copy);
    const c10::Device device = copy->there.device();
    const c10::Stream stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
    copy->copied.block(stream);
    // its memory is not for the next copy before this stream has done what it has to do with it
    copy->there.record_stream(stream);
    *out = new at::Tensor(copy->there);
  });
}

void learn_copy_drop(Copy* copy) {
  delete copy;
}

// The bytes of a GPU's memory that tensors hold now, and the most that they have held since the last reset.
char* learn_gpu_tensors(int ordinal, bool reset, int64_t* now, int64_t* most) {
  return guarded([&] {
    auto* allocator = c10::getDeviceAllocator(c10::DeviceType::CUDA);
    const auto device = static_cast<c10::DeviceIndex>(ordinal);
    if (reset) {
      allocator->resetPeakStats(device);
    }
    const auto stats = allocator->getDeviceStats(device);
    const auto& bytes = stats.allocated_bytes[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
    *now = bytes.current;
    *most = bytes.peak;
  });
}

}  // extern "C"

