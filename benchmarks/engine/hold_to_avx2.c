// Preloaded beside libraries whose `cpuid` instructions were replaced by `ud2`: a handler of SIGILL answers there as
// the processor does, but without AVX-512, VNNI and AMX. See hold_to_avx2.py, which also writes sites.h.
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

struct site {
    const char* library;  // name of its file
    uint64_t address;     // of the instruction, from where the library is loaded
};

#include "sites.h"  // SITES

enum { EAX, EBX, ECX, EDX, REGISTERS };

#define BIT(number) (UINT32_C(1) << (number))
// Leaf 7, subleaf 0.
#define AVX512_EBX (BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31))  // F DQ IFMA .. VL
#define AVX512_ECX (BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14))  // VBMI VBMI2 VNNI BITALG VPOPCNTDQ
#define AVX512_EDX (BIT(2) | BIT(3) | BIT(8) | BIT(23))             // 4VNNIW 4FMAPS VP2INTERSECT FP16
#define AMX_EDX (BIT(22) | BIT(24) | BIT(25))                       // BF16 TILE INT8
// Leaf 7, subleaf 1.
#define VNNI_BF16_EAX (BIT(4) | BIT(5) | BIT(21))             // AVX_VNNI AVX512_BF16 AMX_FP16
#define VNNI_AVX10_EDX (BIT(4) | BIT(8) | BIT(10) | BIT(19))  // AVX_VNNI_INT8 AMX_COMPLEX AVX_VNNI_INT16 AVX10

static const struct site sites[] = {SITES};
static struct sigaction before;
static uint64_t answers;

// How many times the handler has answered.
uint64_t cpuid_answers(void) { return __atomic_load_n(&answers, __ATOMIC_RELAXED); }

// Takes the bits that stand for more than AVX2 out of an answer of `cpuid`.
void mask_cpuid(uint32_t leaf, uint32_t subleaf, uint32_t registers[REGISTERS]) {
    if (leaf == 7 && subleaf == 0) {
        registers[EBX] &= ~AVX512_EBX;
        registers[ECX] &= ~AVX512_ECX;
        registers[EDX] &= ~(AVX512_EDX | AMX_EDX);
    } else if (leaf == 7 && subleaf == 1) {
        registers[EAX] &= ~VNNI_BF16_EAX;
        registers[EDX] &= ~VNNI_AVX10_EDX;
    }
}

static int is_ours(uintptr_t address) {
    Dl_info found;
    if (!dladdr((void*)address, &found) || !found.dli_fname) return 0;
    const char* slash = strrchr(found.dli_fname, '/');
    const char* library = slash ? slash + 1 : found.dli_fname;
    for (size_t i = 0; i < sizeof sites / sizeof *sites; ++i)
        if (sites[i].address == address - (uintptr_t)found.dli_fbase && !strcmp(sites[i].library, library)) return 1;
    return 0;
}

static void on_illegal_instruction(int number, siginfo_t* info, void* context) {
    (void)number, (void)info;
    greg_t* general = ((ucontext_t*)context)->uc_mcontext.gregs;
    if (!is_ours((uintptr_t)general[REG_RIP])) {
        sigaction(SIGILL, &before, NULL);  // the instruction runs again, and meets what it would have met without us
        return;
    }
    const uint32_t leaf = (uint32_t)general[REG_RAX], subleaf = (uint32_t)general[REG_RCX];
    uint32_t registers[REGISTERS];
    __cpuid_count(leaf, subleaf, registers[EAX], registers[EBX], registers[ECX], registers[EDX]);
    mask_cpuid(leaf, subleaf, registers);
    general[REG_RAX] = registers[EAX];
    general[REG_RBX] = registers[EBX];
    general[REG_RCX] = registers[ECX];
    general[REG_RDX] = registers[EDX];
    general[REG_RIP] += 2;
    __atomic_fetch_add(&answers, 1, __ATOMIC_RELAXED);
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action = {.sa_sigaction = on_illegal_instruction, .sa_flags = SA_SIGINFO};
    sigemptyset(&action.sa_mask);
    sigaction(SIGILL, &action, &before);
}
