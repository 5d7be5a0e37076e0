// The device "mini": PyTorch's PrivateUse1 with two devices, streams, events and pinned memory.
//
// Its memory is the host's, and kernels run at once, on the CPU. What a stream holds is the copies to pinned
// memory that have been asked for: they run, in order, when the host waits for the stream, or polls an event
// on it often enough. Until then the host's buffer is poisoned. What a GPU would wait for is counted.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <array>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

constexpr auto kMini = c10::DeviceType::PrivateUse1;
constexpr int kDevices = 2;
constexpr int kStreams = 8;
constexpr double kPoison = -1.2345e30;  // what a host buffer holds until its copy has arrived

// -- settings and counts ----------------------------------------------------------------------------

bool has_float64 = true;
bool is_capturing = false;  // whether the streams are being captured into a graph
int polls = 2;              // how many times an event is polled in vain
std::string failure;        // what every event and every wait raises, as after a device-side assert

std::map<std::string, int64_t> counts;
std::mutex counts_mutex;

void count(const std::string& kind, int64_t number = 1) {
  std::lock_guard<std::mutex> guard(counts_mutex);
  counts[kind] += number;
}

// Raises what a device raises that is broken, or whose stream is being captured.
void refuse(const std::string& what) {
  if (!failure.empty()) throw std::runtime_error(failure);
  if (is_capturing) throw std::runtime_error("operation not permitted when stream is capturing (" + what + ")");
}

// -- streams ----------------------------------------------------------------------------------------

class Queue {
 public:
  void put(std::function<void()> copy) {
    std::lock_guard<std::recursive_mutex> guard(mutex_);
    copies_.push_back(std::move(copy));
  }
  int64_t end() {
    std::lock_guard<std::recursive_mutex> guard(mutex_);
    return done_ + static_cast<int64_t>(copies_.size());
  }
  bool is_past(int64_t position) {
    std::lock_guard<std::recursive_mutex> guard(mutex_);
    return done_ >= position;
  }
  void run_until(int64_t position) {
    // What a copy held is let go without the lock: for a tensor that Python knows of that takes the
    // GIL, whose holder may be waiting for the lock.
    std::vector<std::function<void()>> ran;
    std::lock_guard<std::recursive_mutex> guard(mutex_);
    while (done_ < position) {
      ran.push_back(std::move(copies_.front()));
      copies_.pop_front();
      ran.back()();
      done_++;
    }
  }

 private:
  std::deque<std::function<void()>> copies_;
  int64_t done_ = 0;
  std::recursive_mutex mutex_;
};

std::array<std::array<Queue, kStreams>, kDevices> queues;
std::atomic<int> streams_made{0};
thread_local DeviceIndex current_device = 0;
thread_local std::array<int, kDevices> current_stream = {0, 0};

Queue& queue_of(const Stream& stream) { return queues[stream.device_index()][stream.id()]; }
DeviceIndex index_of(Device device) { return device.index() < 0 ? current_device : device.index(); }

void wait_for(DeviceIndex device, const std::string& kind) {
  refuse(kind);
  count("waits");
  count(kind);
  for (auto& queue : queues[device]) queue.run_until(queue.end());
}

struct Place {  // what an event remembers
  int device = 0;
  int stream = 0;
  int64_t position = 0;
  int polls_left = 0;

  Queue& queue() const { return queues[device][stream]; }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kMini; }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }

  Device getDevice() const override { return Device(kMini, current_device); }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < kDevices, "mini error: invalid device ordinal");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = index_of(device); }
  Device exchangeDevice(Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }

  static Stream stream_of(Device device, int id) {
    return Stream(Stream::UNSAFE, Device(kMini, index_of(device)), id);
  }
  Stream getStream(Device device) const override { return stream_of(device, current_stream[index_of(device)]); }
  Stream getDefaultStream(Device device) const override { return stream_of(device, 0); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  Stream getNewStream(Device device, int) const override {
    return stream_of(device, 1 + streams_made++ % (kStreams - 1));
  }
  Stream exchangeStream(Stream stream) const override {
    auto before = getStream(stream.device());
    current_stream[stream.device_index()] = static_cast<int>(stream.id());
    return before;
  }
  bool queryStream(const Stream& stream) const override {
    refuse("stream query");
    return queue_of(stream).is_past(queue_of(stream).end());
  }
  void synchronizeStream(const Stream& stream) const override {
    refuse("stream synchronize");
    count("waits");
    count("stream synchronize");
    queue_of(stream).run_until(queue_of(stream).end());
  }
  void synchronizeDevice(const DeviceIndex device) const override {
    wait_for(device < 0 ? current_device : device, "device synchronize");
  }
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}

  void record(void** event, const Stream& stream, const DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) {
      *event = new Place;
      count("events");
    }
    *static_cast<Place*>(*event) =
        Place{stream.device_index(), static_cast<int>(stream.id()), queue_of(stream).end(), polls};
  }
  void block(void* event, const Stream& stream) const override {
    if (event == nullptr) return;
    auto place = *static_cast<Place*>(event);
    queue_of(stream).put([place] { place.queue().run_until(place.position); });
  }
  bool queryEvent(void* event) const override {
    refuse("event query");
    count("queries");
    if (event == nullptr) return true;
    auto* place = static_cast<Place*>(event);
    if (!place->queue().is_past(place->position) && --place->polls_left < 0)
      place->queue().run_until(place->position);
    return place->queue().is_past(place->position);
  }
  void synchronizeEvent(void* event) const override {
    refuse("event synchronize");
    if (event == nullptr) return;
    auto* place = static_cast<Place*>(event);
    if (place->queue().is_past(place->position)) return;
    count("waits");
    count("event synchronize");
    place->queue().run_until(place->position);
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Place*>(event); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// -- memory -----------------------------------------------------------------------------------------

struct DeviceMemory final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? std::malloc(bytes) : nullptr;
    if (bytes) std::memset(memory, 0x7f, bytes);  // so that nobody relies on zeros
    return {memory, memory, &std::free, Device(kMini, current_device)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
DeviceMemory device_memory;
REGISTER_ALLOCATOR(kMini, &device_memory);

std::map<void*, size_t> pinned;  // where blocks begin, and their bytes
std::mutex pinned_mutex;

bool is_pinned(const void* pointer) {
  std::lock_guard<std::mutex> guard(pinned_mutex);
  auto block = pinned.upper_bound(const_cast<void*>(pointer));
  if (block == pinned.begin()) return false;
  --block;
  return pointer < static_cast<char*>(block->first) + block->second;
}

void unpin(void* memory) {
  {
    std::lock_guard<std::mutex> guard(pinned_mutex);
    pinned.erase(memory);
  }
  std::free(memory);
}

struct PinnedMemory final : at::HostAllocator {
  at::DataPtr allocate(size_t bytes) override {
    refuse("allocation of pinned memory");
    count("pinned");
    if (bytes == 0) return {nullptr, nullptr, [](void*) {}, c10::kCPU};
    void* memory = std::malloc(bytes);
    std::lock_guard<std::mutex> guard(pinned_mutex);
    pinned[memory] = bytes;
    return {memory, memory, &unpin, c10::kCPU};
  }
  at::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool record_event(void*, void*, Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};
PinnedMemory pinned_memory;

// -- random numbers ---------------------------------------------------------------------------------

// A generator of the device: one of the CPU, with another name.
struct Generator final : c10::GeneratorImpl {
  explicit Generator(DeviceIndex index)
      : GeneratorImpl(Device(kMini, index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        numbers(at::detail::createCPUGenerator()) {}

  void set_current_seed(uint64_t seed) override { numbers.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { numbers.set_offset(offset); }
  uint64_t get_offset() const override { return numbers.get_offset(); }
  uint64_t current_seed() const override { return numbers.current_seed(); }
  uint64_t seed() override { return numbers.seed(); }
  void set_state(const c10::TensorImpl& state) override { numbers.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return numbers.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override {
    auto* copy = new Generator(device_.index());
    copy->set_state(*get_state());
    return copy;
  }

  mutable at::Generator numbers;
};

at::Generator& generator_of(DeviceIndex index) {
  static std::array<at::Generator, kDevices> all = {at::make_generator<Generator>(0),
                                                    at::make_generator<Generator>(1)};
  return all[index < 0 ? current_device : index];
}

// Draws from a generator of the device's while it lives, where an operation draws from that of the CPU.
class OwnDraws {
 public:
  explicit OwnDraws(const at::Generator& own) : own_(own) {
    before_ = host_.get_state();
    host_.set_state(own_.get_state());
  }
  ~OwnDraws() {
    own_.set_state(host_.get_state());
    host_.set_state(before_);
  }

 private:
  at::Generator host_ = at::detail::getDefaultCPUGenerator();
  at::Generator own_;
  Tensor before_;
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(DeviceIndex device) const override { Guard().setDevice(Device(kMini, device)); }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return Guard().exchangeDevice(Device(kMini, device)).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  Device getDeviceFromPtr(void*) const override { return Device(kMini, current_device); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return generator_of(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Generator>(index < 0 ? current_device : index);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto memory = device_memory.allocate(bytes);
    std::memcpy(memory.get(), storage.data(), std::min(bytes, storage.nbytes()));
    memory.unsafe_set_device(storage.device());
    auto& mine = const_cast<c10::Storage&>(storage);
    mine.set_data_ptr_noswap(std::move(memory));
    mine.set_nbytes(bytes);
  }
};
Hooks hooks;

// -- tensors ----------------------------------------------------------------------------------------

void check_dtype(c10::ScalarType dtype) {
  TORCH_CHECK_TYPE(has_float64 || (dtype != at::kDouble && dtype != at::kComplexDouble),
                   "Cannot convert a mini Tensor to float64: the device has none.");
}

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

Tensor empty(c10::SymIntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  c10::DeviceGuard guard(Device(kMini, index_of(c10::device_or_default(device))));
  auto type = c10::dtype_or_default(dtype);
  check_dtype(type);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &device_memory, kKeys, type, format);
}

Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(Device(kMini, index_of(c10::device_or_default(device))));
  auto type = c10::dtype_or_default(dtype);
  check_dtype(type);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           &device_memory, kKeys, type);
}

Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                  std::optional<c10::SymInt> offset) {
  auto where = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           where);
}

Tensor view(const Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

Tensor& set_storage(Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef size,
                    c10::IntArrayRef stride) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(storage));
  tensor->set_sizes_and_strides(size, stride, offset);
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage storage) {
  int64_t number = static_cast<int64_t>(storage.nbytes()) / self.element_size();
  return set_storage(self, std::move(storage), 0, {number}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

void record_stream(Tensor&, Stream) {}

// -- copies -----------------------------------------------------------------------------------------

thread_local bool is_inside_kernel = false;  // what the fallback below copies is no copy of the device's

Tensor on_host(const Tensor& self) {  // the same memory, as a tensor of the CPU
  if (!self.is_privateuseone()) return self;
  auto host = at::from_blob(self.data_ptr(), self.sizes(), self.strides(), self.options().device(at::kCPU));
  host._set_conj(self.is_conj());
  host._set_neg(self.is_neg());
  return host;
}

// While it lives, a copy is part of a kernel: neither counted nor waited for.
struct InsideKernel {
  bool before = std::exchange(is_inside_kernel, true);
  ~InsideKernel() { is_inside_kernel = before; }
};

void download(const Tensor& source, Tensor host, bool non_blocking) {
  count("d2h");
  auto values = on_host(source);
  if (!(non_blocking && is_pinned(host.data_ptr()))) {
    wait_for(source.device().index(), "d2h copy");
    host.copy_(values);
    return;
  }
  values = values.clone();  // the stream runs later, but in order
  host.fill_(host.is_floating_point() || host.is_complex() ? kPoison : 0.0);
  queue_of(Guard().getStream(source.device())).put([host, values]() mutable {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_python(c10::python_ks);  // it would take the GIL
    host.copy_(values);
  });
}

Tensor copy_from(const Tensor& source, const Tensor& to, bool non_blocking) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (is_inside_kernel) {
    on_host(to).copy_(on_host(source));
  } else if (!to.is_privateuseone()) {
    download(source, to, non_blocking);
  } else {
    if (source.is_privateuseone()) {
      count("kernels");
      if (source.device() != to.device()) count("peer to peer");
    } else {
      count("h2d");
      if (!(non_blocking && is_pinned(source.data_ptr()))) wait_for(to.device().index(), "h2d pageable");
    }
    on_host(to).copy_(on_host(source));
  }
  return to;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& to) {
  if (source.sizes() != to.sizes()) at::native::resize_(to, source.sizes(), std::nullopt);
  return copy_from(source, to, false);
}

Tensor on_device(const Tensor& host, Device device) {
  if (!host.defined()) return host;
  InsideKernel inside;
  auto made = at::empty(host.sizes(), host.options().device(device));
  return made.copy_(host);
}

at::Scalar item(const Tensor& self) {
  wait_for(self.device().index(), "d2h item");
  return on_host(self).item();
}

// -- all other operations: on the CPU, in the same memory -------------------------------------------

// What cannot go on before the host knows a number: on CUDA each of them waits.
const std::set<std::string> kLooks = {"aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2",
                                      "aten::unique_dim"};
const std::set<std::string> kIndexing = {"aten::index", "aten::index_put_", "aten::index_put",
                                         "aten::_index_put_impl_"};

struct Call {
  const c10::OperatorHandle& op;
  torch::jit::Stack& stack;

  const std::string& name() const { return op.schema().name(); }
  size_t arity() const { return op.schema().arguments().size(); }
  c10::IValue& argument(size_t i) { return stack[stack.size() - arity() + i]; }
  bool is_foreach() const { return name().rfind("aten::_foreach_", 0) == 0; }

  bool writes_to(size_t i) const {
    auto* alias = op.schema().arguments()[i].alias_info();
    return alias != nullptr && alias->isWrite();
  }
  std::vector<Tensor> tensors(size_t i) {
    auto& value = argument(i);
    std::vector<Tensor> found;
    if (value.isTensor()) found = {value.toTensor()};
    if (value.isTensorList()) found = value.toTensorVector();
    found.erase(std::remove_if(found.begin(), found.end(), [](auto& one) { return !one.defined(); }), found.end());
    return found;
  }
};

// The device of a call. Raises where CUDA does: only a number in a tensor [] may be elsewhere, on the CPU, and
// only to be read.
DeviceIndex device_of(Call& call) {
  DeviceIndex device = -1;
  auto refuse_mix = [&](Device other) {
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, mini:",
                static_cast<int>(device < 0 ? current_device : device), " and ", other, "! (", call.name(), ")");
  };
  for (size_t i = 0; i < call.arity(); i++) {
    for (auto& tensor : call.tensors(i)) {
      if (tensor.is_privateuseone()) {
        if (device >= 0 && device != tensor.device().index()) refuse_mix(tensor.device());
        device = tensor.device().index();
      } else if (tensor.dim() > 0 || call.writes_to(i) || call.is_foreach()) {
        if (!kIndexing.count(call.name())) refuse_mix(tensor.device());
      }
    }
  }
  return device < 0 ? current_device : device;
}

void count_waits(Call& call, DeviceIndex device) {
  bool is_mask = false;
  for (size_t i = 0; i < call.arity(); i++) {
    if (!call.argument(i).isOptionalTensorList()) continue;
    for (const std::optional<Tensor>& index : call.argument(i).toOptionalTensorVector()) {
      if (!index) continue;
      is_mask |= index->scalar_type() == at::kBool || index->scalar_type() == at::kByte;
      if (!index->is_privateuseone()) wait_for(device, "h2d index");
    }
  }
  if (is_mask) wait_for(device, "d2h mask");
  if (kLooks.count(call.name())) wait_for(device, "d2h " + call.name().substr(6));
}

bool is_mixed_list(Call& call) {
  std::set<std::pair<int, c10::ScalarType>> kinds;
  for (auto& tensor : call.tensors(0))
    kinds.emplace(tensor.is_privateuseone() ? tensor.device().index() : -1, tensor.scalar_type());
  return call.is_foreach() && kinds.size() > 1;
}

// What CUDA does with lists of several devices or dtypes: an operation per tensor.
void one_by_one(Call& call) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  auto given = torch::jit::pop(call.stack, call.arity());
  auto length = given[0].toListRef().size();
  std::vector<Tensor> results;
  for (size_t i = 0; i < length; i++) {
    torch::jit::Stack one;
    for (auto& value : given) {
      if (!value.isList() || value.toListRef().size() != length) {
        one.push_back(value);
        continue;
      }
      c10::impl::GenericList part(value.toList().elementType());
      part.push_back(value.toList().get(i));
      one.emplace_back(part);
    }
    call.op.callBoxed(&one);
    if (!one.empty()) results.push_back(one[0].toTensorVector()[0]);
  }
  if (!call.op.schema().returns().empty()) call.stack.emplace_back(results);
}

// The generator that an operation draws from; none if it draws nothing.
std::optional<at::Generator> generator_of(Call& call, DeviceIndex device) {
  if (!call.op.hasTag(at::Tag::nondeterministic_seeded)) return std::nullopt;
  for (size_t i = 0; i < call.arity(); i++) {
    auto& value = call.argument(i);
    if (!value.isGenerator() || !value.toGenerator().defined()) continue;
    auto own = value.toGenerator();
    value = c10::IValue();  // the CPU's kernel takes no generator of another device
    return own;
  }
  return generator_of(device);
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call call{op, *stack};
  if (is_mixed_list(call)) return one_by_one(call);
  auto device = device_of(call);
  count_waits(call, device);
  count("kernels");
  count("kernel " + call.name().substr(6));

  c10::DeviceGuard guard(Device(kMini, device));
  std::optional<OwnDraws> draws;
  if (auto own = generator_of(call, device)) draws.emplace(*own);
  InsideKernel inside;
  at::native::cpu_fallback(op, stack);
  for (auto& value : *stack)
    if (value.isTensor() && value.toTensor().defined() && value.toTensor().is_privateuseone())
      check_dtype(value.toTensor().scalar_type());
}

// torch's convolution has no fallback: it asks each backend for these two.
Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
                   c10::IntArrayRef output_padding, int64_t groups) {
  count("kernels");
  auto host_bias = bias && bias->defined() ? std::optional<Tensor>(on_host(*bias)) : std::nullopt;
  auto out = at::convolution(on_host(input), on_host(weight), host_bias, stride, padding, dilation, transposed,
                             output_padding, groups);
  return on_device(out, input.device());
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> wanted) {
  count("kernels");
  auto biases = at::OptionalIntArrayRef(c10::IntArrayRef(&weight.sizes()[transposed ? 1 : 0], 1));
  auto [of_input, of_weight, of_bias] =
      at::convolution_backward(on_host(gradient), on_host(input), on_host(weight), biases, stride, padding,
                               dilation, transposed, output_padding, groups, wanted);
  auto device = input.device();
  return {on_device(of_input, device), on_device(of_weight, device), on_device(of_bias, device)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Storage", set_whole_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("record_stream", record_stream);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  // torch's own kernels for lists take one tensor after the other, CUDA's take them all at once. Those for
  // what is written with out= allocate the result, and call again: CUDA's have one kernel.
  auto& dispatcher = c10::Dispatcher::singleton();
  for (auto& name : dispatcher.getAllOpNames()) {
    auto op = dispatcher.findOp(name);
    auto is_foreach = name.name.rfind("aten::_foreach_", 0) == 0;
    auto calls_again = c10::DispatchKey::CompositeExplicitAutogradNonFunctional;
    if (is_foreach || (name.name.rfind("aten::", 0) == 0 && op->hasKernelForDispatchKey(calls_again)))
      m.impl(toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
}

// A copy writes conjugated numbers out. Its input must not be written out before, which would be a copy.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv1d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mse_loss, fp32)
  KERNEL_PRIVATEUSEONE(nll_loss, fp32)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(exp, fp32)
  KERNEL_PRIVATEUSEONE(pow, Tensor_Scalar, fp32)
  KERNEL_PRIVATEUSEONE(softmax, int, fp32_set_opt_dtype)
  KERNEL_PRIVATEUSEONE(log_softmax, int, fp32_set_opt_dtype)
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("setup", [] {
    at::RegisterPrivateUse1HooksInterface(&hooks);
    at::setHostAllocator(kMini, &pinned_memory);
  });
  m.def("counts", [] {
    std::lock_guard<std::mutex> guard(counts_mutex);
    return counts;
  });
  m.def("on_device", [](const Tensor& host, int index) { return on_device(host, Device(kMini, index)); });
  m.def("current_device", [] { return static_cast<int>(current_device); });
  m.def("set_device", [](int index) { Guard().setDevice(Device(kMini, index)); });
  m.def("is_capturing", [] { return is_capturing; });
  m.def("set_polls", [](int number) { polls = number; });
  m.def("set_float64", [](bool has_it) { has_float64 = has_it; });
  m.def("set_failure", [](const std::string& text) { failure = text; });
  m.def("set_capturing", [](bool captures) { is_capturing = captures; });
  m.def("get_rng_state", [](int index) { return generator_of(static_cast<DeviceIndex>(index)).get_state(); });
  m.def("set_rng_state", [](const Tensor& state, int index) {
    generator_of(static_cast<DeviceIndex>(index)).set_state(state);
  });
  m.def("manual_seed", [](uint64_t seed, int index) {
    generator_of(static_cast<DeviceIndex>(index)).set_current_seed(seed);
  });
}
