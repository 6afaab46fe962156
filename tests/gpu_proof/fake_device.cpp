// One CUDA device that does nothing, so that autograd takes FakeTensors for CUDA's where there is
// no driver. To be loaded after torch, in a process of its own.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstring>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return {DeviceType::CUDA, 0}; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
  void record(void **, const Stream &, DeviceIndex, c10::EventFlag) const override {}
  void block(void *, const Stream &) const override {}
};

struct Hooks : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};

[[gnu::constructor]] void install() {
  static const Guard guard;
  static const Hooks hooks;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
  // torch has made its hooks already and gives out that one object for ever: it becomes ours.
  std::memcpy((void *)&at::detail::getCUDAHooks(), (const void *)&hooks, sizeof(void *));
}

} // namespace
