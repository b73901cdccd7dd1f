// Compiled without ThreadSanitizer's instrumentation: turns are taken on one thread.
#include "../../../csrc/cuda/intrinsics.h"

#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <vector>

#if defined(VITFAST_TSAN)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(VITFAST_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace vitfast {
namespace host {
namespace {

constexpr std::size_t kStackBytes = 64 << 10;
constexpr int kWarp = 32;

// Threads that wait for each other. The last to come lets all go on.
struct Gate {
  int arrived = 0, members = 0;
  std::int64_t passed = 0;
  char order = 0;  // its address tells ThreadSanitizer what happened before what
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  const char* waits = nullptr;
  void* tsan = nullptr;
  void* fake_stack = nullptr;
  float lane = 0.f;
};

struct Block {
  std::vector<Fiber> fibers;
  Gate all;
  std::vector<Gate> warps;
  std::unique_ptr<char[]> shared;
  std::int64_t index = 0, count = 0;
  int running = 0;
  bool moved = false;  // whether a fiber did anything since the last look
  const std::function<void()>* body = nullptr;
};

Block* current;
Gate end_of_launch;
ucontext_t scheduler;
#if defined(VITFAST_TSAN)
void* scheduler_fiber;
#endif
#if defined(VITFAST_ASAN)
const void* scheduler_stack;
std::size_t scheduler_size;
void* scheduler_fake;
#endif

void order_before(Gate& gate) {
#if defined(VITFAST_TSAN)
  __tsan_release(&gate.order);
#else
  (void)gate;
#endif
}
void order_after(Gate& gate) {
#if defined(VITFAST_TSAN)
  __tsan_acquire(&gate.order);
#else
  (void)gate;
#endif
}

// To the scheduler; comes back when this fiber has its next turn.
void yield(bool last) {
  Fiber& me = current->fibers[static_cast<std::size_t>(current->running)];
#if defined(VITFAST_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &me.fake_stack, scheduler_stack, scheduler_size);
#else
  (void)last;
#endif
#if defined(VITFAST_TSAN)
  __tsan_switch_to_fiber(scheduler_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&me.context, &scheduler);
#if defined(VITFAST_ASAN)
  __sanitizer_finish_switch_fiber(me.fake_stack, nullptr, nullptr);
#endif
}

// `orders`: what was written before is seen afterwards.
void pass(Gate& gate, bool orders, const char* what) {
  Fiber& me = current->fibers[static_cast<std::size_t>(current->running)];
  const std::int64_t turn = gate.passed;
  if (orders) order_before(gate);
  current->moved = true;
  if (++gate.arrived == gate.members) {
    gate.arrived = 0;
    ++gate.passed;
  }
  me.waits = what;
  while (gate.passed == turn) yield(false);
  me.waits = nullptr;
  current->moved = true;
  if (orders) order_after(gate);
}

void enter() {
#if defined(VITFAST_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  (*current->body)();
  Fiber& me = current->fibers[static_cast<std::size_t>(current->running)];
  order_before(end_of_launch);
  me.done = true;
  current->moved = true;
  yield(true);
}

void turn(Block& block, int index) {
  Fiber& fiber = block.fibers[static_cast<std::size_t>(index)];
  block.running = index;
#if defined(VITFAST_ASAN)
  __sanitizer_start_switch_fiber(&scheduler_fake, fiber.stack.get(), kStackBytes);
#endif
#if defined(VITFAST_TSAN)
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&scheduler, &fiber.context);
#if defined(VITFAST_ASAN)
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  fiber.done = false;
  fiber.waits = nullptr;
#if defined(VITFAST_TSAN)
  fiber.tsan = __tsan_create_fiber(0);
#endif
}

void run(Block& block) {
  const int threads = static_cast<int>(block.fibers.size());
  for (Fiber& fiber : block.fibers) prepare(fiber);
  int left = threads;
  while (left > 0) {
    block.moved = false;
    for (int i = 0; i < threads; ++i)
      if (!block.fibers[static_cast<std::size_t>(i)].done) turn(block, i);
    left = 0;
    std::string waits;
    for (const Fiber& fiber : block.fibers) {
      left += !fiber.done;
      if (!fiber.done && fiber.waits) waits = fiber.waits;
    }
    if (left > 0 && !block.moved)
      throw std::runtime_error("block " + std::to_string(block.index) + ": " +
                               std::to_string(left) + " of " + std::to_string(threads) +
                               " threads wait for ever " + waits);
  }
#if defined(VITFAST_TSAN)
  for (Fiber& fiber : block.fibers) __tsan_destroy_fiber(fiber.tsan);
#endif
}

}  // namespace

std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

// Nothing orders the blocks of a launch, so that ThreadSanitizer sees what two of them do to the
// same place; therefore each has memory of its own until the end.
void launch(const std::string& name, std::int64_t blocks, int threads, std::size_t shared_bytes,
            const void* arguments, std::size_t size) {
  const auto found = kernels().find(name);
  if (found == kernels().end()) throw std::runtime_error("there is no kernel " + name);
  const Kernel& kernel = found->second;
  if (size != kernel.size)
    throw std::runtime_error(name + " takes " + std::to_string(kernel.size) +
                             " bytes of arguments, not " + std::to_string(size));
  if (threads <= 0 || threads % kWarp || threads > kernel.most_threads || blocks <= 0 ||
      blocks > 0x7fffffff)
    throw std::runtime_error(name + ": a launch of " + std::to_string(blocks) + " blocks of " +
                             std::to_string(threads) + " threads");
  const std::function<void()> body = [&] { kernel.run(arguments); };
  Block block;
  block.fibers = std::vector<Fiber>(static_cast<std::size_t>(threads));
  block.count = blocks;
  block.body = &body;
  current = &block;
#if defined(VITFAST_TSAN)
  scheduler_fiber = __tsan_get_current_fiber();
#endif
  std::vector<std::unique_ptr<char[]>> used;
  for (std::int64_t i = 0; i < blocks; ++i) {
    block.index = i;
    block.all = Gate{0, threads, 0, 0};
    block.warps.assign(static_cast<std::size_t>(threads / kWarp), Gate{0, kWarp, 0, 0});
    // Anew for each block, so that nothing finds what another block left.
    block.shared.reset(new char[shared_bytes]);  // exactly, for AddressSanitizer
    std::memset(block.shared.get(), 0xff, shared_bytes);
    run(block);
#if defined(VITFAST_TSAN)
    used.push_back(std::move(block.shared));
    for (Fiber& fiber : block.fibers) used.push_back(std::move(fiber.stack));
#endif
  }
  order_after(end_of_launch);
  current = nullptr;
}

int thread() { return current->running; }
int threads() { return static_cast<int>(current->fibers.size()); }
std::int64_t block() { return current->index; }
std::int64_t blocks() { return current->count; }
void* shared() { return current->shared.get(); }
void wait_for_block() { pass(current->all, true, "at a barrier"); }

float exchange(float value, int lane) {
  const int me = current->running, first = me / kWarp * kWarp;
  Gate& gate = current->warps[static_cast<std::size_t>(me / kWarp)];
  current->fibers[static_cast<std::size_t>(me)].lane = value;
  pass(gate, false, "for the lanes of a warp");  // __shfl_sync orders no memory
  const float found = current->fibers[static_cast<std::size_t>(first + lane)].lane;
  pass(gate, false, "for the lanes of a warp");
  return found;
}

}  // namespace host
}  // namespace vitfast
