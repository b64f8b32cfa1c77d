// A pass lane whose ops come late at random, while the other lanes of the device copy and multiply beside it: what a
// row computes must not show it. The ops are those of the kernels given. Called by one thread, the test's.
#pragma once

#include <memory>
#include <random>

#include "forwarding_kernels.h"

namespace vericache::test {

class JitteredKernels final : public ForwardingKernels {
 public:
  // `to` is a device's pass lane and multiplies `weight` on its draft lane; all of them outlive this. Waits for what
  // it enqueued when it goes.
  JitteredKernels(Kernels& to, const PackedMatrix& weight, Device& device, uint64_t seed)
      : ForwardingKernels(to), weight_(weight), random_(seed), host_(device.make_host_memory(2 * kCopyBytes)) {
    x_ = device.allocate_array<bf16>(static_cast<size_t>(kRows) * static_cast<size_t>(padded_dim(weight.in)), "test");
    y_ = device.allocate_array<float>(static_cast<size_t>(kRows) * static_cast<size_t>(weight.out), "test");
    arriving_ = device.allocate(kCopyBytes, "test");
    leaving_ = device.allocate(kCopyBytes, "test");
    from_ = host_->allocate(kCopyBytes, "test");
    to_ = host_->allocate(kCopyBytes, "test");
    while (host_->ready(from_, kCopyBytes) < kCopyBytes || host_->ready(to_, kCopyBytes) < kCopyBytes) {
    }
  }
  ~JitteredKernels() override {
    for (const Place place : {Place::draft, Place::wire_in, Place::wire_out}) {
      Kernels& other = k_.lane(place);
      other.wait(other.mark());
    }
  }

  Kernels& lane(Place place) override { return place == Place::pass ? *this : k_.lane(place); }

  void stage(const PassRows& pass) override {
    disturb();
    k_.stage(pass);
  }
  void embed(const PackedMatrix& table, const PassRows& pass, float* out) override {
    disturb();
    k_.embed(table, pass, out);
  }
  void matmul(const PackedMatrix& weight, const bf16* x, int rows, float* y, Epilogue epilogue) override {
    disturb();
    k_.matmul(weight, x, rows, y, epilogue);
  }
  void rms_norm(const float* x, const float* weight, float eps, int rows, int dim, bf16* out) override {
    disturb();
    k_.rms_norm(x, weight, eps, rows, dim, out);
  }
  void store_qkv(const QkvArgs& args) override {
    disturb();
    k_.store_qkv(args);
  }
  void attention(const AttentionArgs& args) override {
    disturb();
    k_.attention(args);
  }
  void choose(const float* logits, const PassRows& pass, int vocabulary) override {
    disturb();
    k_.choose(logits, pass, vocabulary);
  }

  int64_t disturbances() const { return disturbances_; }

 private:
  static constexpr int kRows = 4;
  static constexpr size_t kCopyBytes = size_t{256} << 10;
  static constexpr int kMostMicroseconds = 200;

  // Before most ops nothing; else this lane or the wire waits, or another lane has something to do.
  void disturb() {
    constexpr uint64_t kOneIn = 20;
    const uint64_t what = random_() % kOneIn;
    const int microseconds = static_cast<int>(random_() % kMostMicroseconds);
    disturbances_ += what < 5 ? 1 : 0;
    if (what == 0) {
      k_.delay(microseconds);
    } else if (what == 1) {
      k_.lane(Place::wire_in).delay(microseconds);
    } else if (what == 2) {
      k_.lane(Place::draft).matmul(weight_, x_, kRows, y_, Epilogue::store);
    } else if (what == 3) {
      const BlockCopy copy{arriving_, from_, kCopyBytes};
      k_.lane(Place::wire_in).copy({&copy, 1});
    } else if (what == 4) {
      const BlockCopy copy{to_, leaving_, kCopyBytes};
      k_.lane(Place::wire_out).copy({&copy, 1});
    }
  }

  PackedMatrix weight_;
  std::mt19937_64 random_;
  std::unique_ptr<Device> host_;
  bf16* x_ = nullptr;
  float* y_ = nullptr;
  std::byte* arriving_ = nullptr;
  std::byte* leaving_ = nullptr;
  std::byte* from_ = nullptr;
  std::byte* to_ = nullptr;
  int64_t disturbances_ = 0;
};

}  // namespace vericache::test
