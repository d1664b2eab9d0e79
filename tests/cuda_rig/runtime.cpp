// Fibers, schedules and the checker behind simt.h. Compiled without the sanitizer, linked with one instrumented source.
//
// The checker gets every access of memory by the calls that -fsanitize=thread inserts, __tsan_read4(address) and the like,
// which are defined here instead of by the sanitizer's library. Each byte of the kernel's arrays and of shared memory has
// a shadow: who wrote it last, which two different threads read it last, and in which epoch of their block and warp. A
// barrier ends an epoch: two accesses of which one writes are ordered if a barrier that both took part in lies between.

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "simt.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr int WARP = 32, MOST_THREADS = 1024, MOST_FINDINGS = 16;
constexpr size_t STACK_BYTES = 64 * 1024;

enum Kind { RACE, OUT_OF_BOUNDS, MISALIGNED, UNINITIALISED, READ_ONLY, DIVERGED, WRONG_MASK };
enum Schedule { FIFO, LIFO, RANDOM, PREEMPT };

struct Finding {
    int kind, argument;  // argument: its number, -1 for shared memory, -2 for none
    long long offset;    // in bytes
    unsigned block, thread, other_block, other_thread;
    const void* place;  // in the code, for addr2line
};

// An array that the kernel was given. initialised: a byte for each of its bytes, or null if all of them are.
struct Region {
    char* begin;
    long long size;
    int read_only;
    unsigned char* initialised;
};

struct Access {
    unsigned block, thread;  // thread: its number + 1 in the block, 0 for none
    unsigned block_epoch, warp_epoch;
    bool atomic;
};
struct Shadow {
    Access write, reads[2];
};

struct Fiber {
    void* stack_pointer;
    dim3 index;
    bool done, waiting;
};

struct WarpMeeting {  // of the lanes of one mask
    unsigned mask, arrived, generation;
    int line;
    alignas(16) char values[2][WARP][16];
};

struct Launch {
    void (*kernel)(void**);
    void** arguments;
    Region* regions;
    int region_count;
    long long shared_bytes;
    int schedule, checked;
    Finding* findings;
    int finding_count;
};

Launch launch;
std::vector<Fiber> fibers;
std::vector<std::vector<Shadow>> shadows;  // of the regions
std::vector<Shadow> shared_shadow;
std::vector<unsigned> shared_block;        // the block, plus 1, that last wrote each byte of shared memory
char *tls, *stacks;
size_t tls_bytes;
std::vector<std::pair<char*, size_t>> dynamic_arrays, shared_parts;  // parts: what a block can use of `tls`
void* main_stack_pointer;
int current, alive;
unsigned block_number, block_epoch, warp_epochs[MOST_THREADS / WARP];
bool abandoned;
unsigned long long random_state;

unsigned next_random() {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return unsigned(random_state >> 32);
}

}  // namespace

// Save the callee's registers on this stack, and go on on the other.
extern "C" void simt_switch(void** save, void* restore);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace {

void to_scheduler() { simt_switch(&fibers[current].stack_pointer, main_stack_pointer); }

void report(Kind kind, int argument, long long offset, const void* place, unsigned other_block = 0,
            unsigned other_thread = 0) {
    if (launch.finding_count < MOST_FINDINGS)
        launch.findings[launch.finding_count++] =
            {kind, argument, offset, block_number, unsigned(current), other_block, other_thread, place};
}

// No way to go on: the scheduler drops all fibers.
[[noreturn]] void abandon() {
    abandoned = true;
    to_scheduler();
    std::abort();
}

void fiber_body() {
    launch.kernel(launch.arguments);
    fibers[current].done = true;
    --alive;
    to_scheduler();
    std::abort();
}

void start(int number) {
    Fiber& fiber = fibers[number];
    const unsigned x = number % blockDim.x, y = number / blockDim.x % blockDim.y, z = number / blockDim.x / blockDim.y;
    fiber = {nullptr, {x, y, z}, false, false};
    void** top = reinterpret_cast<void**>(stacks + (number + 1) * STACK_BYTES) - 1;
    *--top = reinterpret_cast<void*>(fiber_body);  // where simt_switch returns to; the stack is then as after a call
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = top;
}

// Block barriers.

int block_arrived, block_line, block_operation, block_value;
unsigned block_generation;
int block_results[2];

void block_meeting_done() {
    block_results[block_generation % 2] = block_value;
    ++block_generation, ++block_epoch;
    block_arrived = 0;
    for (unsigned& epoch : warp_epochs) ++epoch;
    for (Fiber& fiber : fibers) fiber.waiting = false;
}

WarpMeeting meetings[MOST_THREADS / WARP][4];

WarpMeeting* meeting_of(int warp, unsigned mask) {
    for (WarpMeeting& meeting : meetings[warp])
        if (meeting.mask == mask) return &meeting;
    for (WarpMeeting& meeting : meetings[warp])
        if (!meeting.arrived) {
            meeting.mask = mask;
            return &meeting;
        }
    return nullptr;
}

// One block: fibers run until they wait for others. No fiber that can run, and some that are not done: diverged.
void run_block() {
    const int count = blockDim.x * blockDim.y * blockDim.z;
    fibers.resize(count);
    for (int i = 0; i < count; ++i) start(i);
    alive = count, block_arrived = 0, abandoned = false;
    std::memset(meetings, 0, sizeof meetings);
    for (const auto& part : shared_parts) std::memset(part.first, 0xff, part.second);
    std::vector<int> ready;
    while (alive && !abandoned) {
        ready.clear();
        for (int i = 0; i < count; ++i)
            if (!fibers[i].done && !fibers[i].waiting) ready.push_back(i);
        if (ready.empty()) {
            for (current = 0; fibers[current].done; ++current) {
            }
            report(DIVERGED, -2, 0, nullptr);
            return;
        }
        if (launch.schedule == LIFO) std::reverse(ready.begin(), ready.end());
        if (launch.schedule >= RANDOM)
            for (size_t i = ready.size() - 1; i > 0; --i) std::swap(ready[i], ready[next_random() % (i + 1)]);
        for (int number : ready) {
            current = number, threadIdx = fibers[number].index;
            simt_switch(&main_stack_pointer, fibers[number].stack_pointer);
            if (abandoned) break;
        }
    }
}

int find_tls(dl_phdr_info* info, size_t, void* wanted) {
    const auto address = reinterpret_cast<ElfW(Addr)>(wanted);
    bool mine = false;
    size_t bytes = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const ElfW(Phdr) & header = info->dlpi_phdr[i];
        const ElfW(Addr) begin = info->dlpi_addr + header.p_vaddr;
        if (header.p_type == PT_LOAD && address >= begin && address < begin + header.p_memsz) mine = true;
        if (header.p_type == PT_TLS) bytes = header.p_memsz;
    }
    if (!mine) return 0;
    tls = static_cast<char*>(info->dlpi_tls_data), tls_bytes = tls ? bytes : 0;
    return 1;
}

// Static shared variables, and of the dynamic arrays as much as was asked for.
void find_shared_parts() {
    std::sort(dynamic_arrays.begin(), dynamic_arrays.end());
    shared_parts.clear();
    char* from = tls;
    for (const auto& array : dynamic_arrays) {
        shared_parts.emplace_back(from, array.first - from);
        shared_parts.emplace_back(array.first, std::min<size_t>(array.second, launch.shared_bytes));
        from = array.first + array.second;
    }
    shared_parts.emplace_back(from, tls + tls_bytes - from);
}

// The checker.

bool ordered(const Access& before, const Access& now) {
    if (!before.thread || (before.block == now.block && before.thread == now.thread)) return true;
    if (before.atomic && now.atomic) return true;
    if (before.block != now.block) return false;
    if (before.block_epoch != now.block_epoch) return true;
    return (before.thread - 1) / WARP == (now.thread - 1) / WARP && before.warp_epoch != now.warp_epoch;
}

const Access* unordered(const Shadow& shadow, const Access& now, bool writes) {
    if (!ordered(shadow.write, now)) return &shadow.write;
    if (writes)
        for (const Access& read : shadow.reads)
            if (!ordered(read, now)) return &read;
    return nullptr;
}

void remember(Shadow& shadow, const Access& now, bool writes) {
    if (writes) {
        shadow.write = now;
    } else {
        if (shadow.reads[0].thread != now.thread || shadow.reads[0].block != now.block) shadow.reads[1] = shadow.reads[0];
        shadow.reads[0] = now;
    }
}

// One access to bytes that a region or shared memory holds.
void check_bytes(Shadow* shadow, unsigned char* written, int size, const Access& now, bool writes, bool reads,
                 int argument, long long offset, const void* place) {
    bool raced = false, unwritten = false;
    for (int i = 0; i < size; ++i) {
        const Access* other = unordered(shadow[i], now, writes);
        if (other && !raced) report(RACE, argument, offset + i, place, other->block, other->thread - 1), raced = true;
        if (reads && written && !written[i] && !unwritten)
            report(UNINITIALISED, argument, offset + i, place), unwritten = true;
        if (reads) remember(shadow[i], now, false);
        if (writes) {
            remember(shadow[i], now, true);
            if (written) written[i] = 1;
        }
    }
}

bool in_code(const void* at) {
    Dl_info found;
    return dladdr(at, &found) != 0;
}

void check(const void* address, int size, bool writes, bool reads, bool atomic, int alignment, const void* place) {
    if (!launch.checked) return;
    char* at = static_cast<char*>(const_cast<void*>(address));
    if (at >= stacks && at < stacks + MOST_THREADS * STACK_BYTES) return;
    const unsigned warp = current / WARP;
    const Access now{block_number, unsigned(current) + 1, block_epoch, warp_epochs[warp], atomic};
    if (at >= tls && at < tls + tls_bytes) {
        for (const auto& array : dynamic_arrays)
            if (at >= array.first && at + size > array.first + launch.shared_bytes && at < array.first + array.second) {
                report(OUT_OF_BOUNDS, -1, at - array.first, place);
                abandon();
            }
        if (reinterpret_cast<uintptr_t>(at) % alignment) report(MISALIGNED, -1, at - tls, place);
        const long long offset = at - tls;
        unsigned char written[16];
        for (int i = 0; i < size; ++i) {
            written[i] = shared_block[offset + i] == block_number + 1;
            if (!written[i]) shared_shadow[offset + i] = Shadow();
        }
        check_bytes(&shared_shadow[offset], written, size, now, writes, reads, -1, offset, place);
        if (writes) std::fill_n(&shared_block[offset], size, block_number + 1);
    } else {
        int number = 0;
        while (number < launch.region_count && (at < launch.regions[number].begin ||
                                                at >= launch.regions[number].begin + launch.regions[number].size))
            ++number;
        if (number == launch.region_count) {
            if (in_code(at)) return;  // constants of the source
            int nearest = -2;
            for (int i = 0; i < launch.region_count; ++i)
                if (at >= launch.regions[i].begin - 4096 && at < launch.regions[i].begin + launch.regions[i].size + 4096)
                    nearest = i;
            report(OUT_OF_BOUNDS, nearest, nearest < 0 ? 0 : at - launch.regions[nearest].begin, place);
            abandon();
        }
        const Region& region = launch.regions[number];
        const long long offset = at - region.begin;
        if (offset + size > region.size) {
            report(OUT_OF_BOUNDS, number, offset, place);
            abandon();
        }
        if (writes && region.read_only) {
            report(READ_ONLY, number, offset, place);
            abandon();
        }
        if (reinterpret_cast<uintptr_t>(at) % alignment) report(MISALIGNED, number, offset, place);
        check_bytes(&shadows[number][offset], region.initialised ? region.initialised + offset : nullptr, size, now, writes,
                    reads, number, offset, place);
    }
    if (launch.schedule == PREEMPT && next_random() % 4 == 0) to_scheduler();
}

void check_range(void* at, unsigned long size, bool writes, const void* place) {
    if (size == 2 || size == 4 || size == 8 || size == 16) return check(at, size, writes, !writes, false, size, place);
    for (unsigned long i = 0; i < size; ++i) check(static_cast<char*>(at) + i, 1, writes, !writes, false, 1, place);
}

}  // namespace

extern "C" {

unsigned simt_active_lane() { return current % WARP; }

int simt_block_barrier(int value, int operation, int line) {
    if (block_arrived == 0) block_line = line, block_operation = operation, block_value = operation == SIMT_AND;
    if (line != block_line || operation != block_operation) {
        report(DIVERGED, -2, line, __builtin_return_address(0));
        abandon();
    }
    block_value = operation == SIMT_COUNT ? block_value + value : operation == SIMT_AND ? block_value & value : block_value | value;
    const unsigned generation = block_generation;
    if (++block_arrived == int(fibers.size())) {
        block_meeting_done();
    } else {
        fibers[current].waiting = true;
        while (block_generation == generation) to_scheduler();
    }
    return block_results[generation % 2];
}

void simt_warp_exchange(unsigned mask, const void* mine, int size, void* all, int line) {
    const int warp = current / WARP, lane = current % WARP;
    const int lanes = std::min<int>(WARP, fibers.size() - warp * WARP);
    const unsigned there = lanes == WARP ? 0xffffffffu : (1u << lanes) - 1;
    unsigned wanted = mask & there;
    WarpMeeting* meeting = meeting_of(warp, mask);
    if (!(mask >> lane & 1) || !meeting) {
        report(WRONG_MASK, -2, mask, __builtin_return_address(0));
        abandon();
    }
    if (meeting->arrived == 0) meeting->line = line;
    if (meeting->line != line) {
        report(DIVERGED, -2, line, __builtin_return_address(0));
        abandon();
    }
    for (int i = 0; i < lanes; ++i)
        if ((wanted >> i & 1) && fibers[warp * WARP + i].done) {
            report(WRONG_MASK, -2, mask, __builtin_return_address(0));
            abandon();
        }
    const unsigned generation = meeting->generation;
    // A lane can be one meeting ahead of another that still reads, not two: two rows of values are enough.
    std::memcpy(meeting->values[generation % 2][lane], mine, size);
    meeting->arrived |= 1u << lane;
    if (meeting->arrived == wanted) {
        ++meeting->generation, meeting->arrived = 0;
        ++warp_epochs[warp];
        for (int i = 0; i < lanes; ++i)
            if (wanted >> i & 1) fibers[warp * WARP + i].waiting = false;
    } else {
        fibers[current].waiting = true;
        while (meeting->generation == generation) to_scheduler();
    }
    for (int i = 0; i < WARP; ++i)
        std::memcpy(static_cast<char*>(all) + i * size, meeting->values[generation % 2][i], size);
}

void simt_atomic_access(const void* at, int size) { check(at, size, true, true, true, size, __builtin_return_address(0)); }

// The dynamic shared arrays of the source, told by the text that simt.py adds to it.
void simt_dynamic_array(void* at, size_t bytes) { dynamic_arrays.emplace_back(static_cast<char*>(at), bytes); }

// Returns the number of findings.
int simt_launch(void (*kernel)(void**), void** arguments, const unsigned* grid, const unsigned* block, long long shared_bytes,
                Region* regions, int region_count, int checked, int schedule, unsigned long long seed,
                void (*dynamic)(), Finding* findings) {
    if (!stacks)
        stacks = static_cast<char*>(mmap(nullptr, MOST_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    launch = {kernel, arguments, regions, region_count, shared_bytes, schedule, checked, findings, 0};
    dynamic_arrays.clear();
    dynamic();  // first, so that this thread has its thread-local memory
    tls = nullptr, tls_bytes = 0;
    dl_iterate_phdr(find_tls, reinterpret_cast<void*>(simt_active_lane));
    find_shared_parts();
    if (checked) shared_shadow.resize(tls_bytes), shared_block.assign(tls_bytes, 0);
    random_state = seed * 0x9e3779b97f4a7c15ull + 1;
    shadows.assign(region_count, {});
    for (int i = 0; checked && i < region_count; ++i) shadows[i].assign(regions[i].size, Shadow());
    gridDim = {grid[0], grid[1], grid[2]}, blockDim = {block[0], block[1], block[2]};
    block_number = block_epoch = 0;
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; ++x, ++block_number) {
                blockIdx = {x, y, z};
                run_block();
                if (abandoned) return launch.finding_count;
            }
    return launch.finding_count;
}

// What -fsanitize=thread calls. A card knows no unaligned access: those are held to the same alignment.

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
#define SIMT_ACCESS(BYTES)                                                                                              \
    void __tsan_read##BYTES(void* at) { check(at, BYTES, false, true, false, BYTES, __builtin_return_address(0)); }      \
    void __tsan_write##BYTES(void* at) { check(at, BYTES, true, false, false, BYTES, __builtin_return_address(0)); }     \
    void __tsan_unaligned_read##BYTES(void* at) { check(at, BYTES, false, true, false, BYTES, __builtin_return_address(0)); } \
    void __tsan_unaligned_write##BYTES(void* at) { check(at, BYTES, true, false, false, BYTES, __builtin_return_address(0)); }
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
// What may be unaligned comes as a range.
void __tsan_read_range(void* at, unsigned long size) { check_range(at, size, false, __builtin_return_address(0)); }
void __tsan_write_range(void* at, unsigned long size) { check_range(at, size, true, __builtin_return_address(0)); }
}
