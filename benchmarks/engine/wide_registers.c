// Which registers beyond those of AVX2 the threads of this process have written: the kernel notes it in the frame of
// every signal. Only what is in its initial state counts as unwritten.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define WIDE (UINT64_C(7) << 5 | UINT64_C(3) << 17)  // opmask, upper halves of ZMM 0 to 15, ZMM 16 to 31; AMX
#define STATES_AT 512                                // of the header behind the legacy area of XSAVE
#define LIMIT_S 60
#define PAUSE_US 10000  // for threads that still spin, until they wait

static sem_t answered;
static uint64_t written;
static int running;  // threads that did not wait

// Whether a thread waits in a system call: it keeps nothing in these registers then, as callers save them all.
static int waits(const mcontext_t* machine) {
    const unsigned char* next = (const unsigned char*)machine->gregs[REG_RIP];
    return !memcmp(next - 2, "\x0f\x05", 2) || !memcmp(next, "\x0f\x05", 2);  // after `syscall`, or at it to restart
}

static void on_signal(int number, siginfo_t* info, void* context) {
    (void)number, (void)info;
    mcontext_t* machine = &((ucontext_t*)context)->uc_mcontext;
    uint64_t* states = (uint64_t*)((char*)machine->fpregs + STATES_AT);
    __atomic_fetch_or(&written, *states & WIDE, __ATOMIC_SEQ_CST);
    if (waits(machine))
        *states &= ~WIDE;  // it goes on with these registers in their initial state
    else
        __atomic_fetch_add(&running, 1, __ATOMIC_SEQ_CST);
    sem_post(&answered);
}

// Asks every thread once; false where they cannot be listed or do not answer in time.
static int ask_threads(int number, const struct timespec* latest) {
    DIR* threads = opendir("/proc/self/task");
    if (!threads) return 0;
    int asked = 0;
    for (struct dirent* entry; (entry = readdir(threads));) {
        const long thread = atol(entry->d_name);
        asked += thread > 0 && syscall(SYS_tgkill, getpid(), thread, number) == 0;
    }
    closedir(threads);
    for (; asked > 0; --asked)
        while (sem_timedwait(&answered, latest) != 0)
            if (errno != EINTR) return 0;
    return 1;
}

// The states that any thread has written since the last call, as bits of XCR0; -1 where not all threads answer, and
// come to wait, within LIMIT_S.
int64_t take_wide_registers(void) {
    const int number = SIGRTMIN + 9;
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigemptyset(&action.sa_mask);
    sigaction(number, &action, NULL);
    sem_init(&answered, 0, 0);
    written = 0;
    struct timespec now, latest;
    clock_gettime(CLOCK_REALTIME, &latest);
    latest.tv_sec += LIMIT_S;
    do {
        running = 0;
        if (!ask_threads(number, &latest)) return -1;
        if (running == 0) return (int64_t)written;
        usleep(PAUSE_US);
        clock_gettime(CLOCK_REALTIME, &now);
    } while (now.tv_sec < latest.tv_sec);
    return -1;
}
