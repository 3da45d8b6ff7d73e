// Which registers beyond those of AVX2 the threads of this process have written: the kernel notes it in the frame of
// every signal. Only what is in its initial state counts as unwritten.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <semaphore.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define WIDE (UINT64_C(7) << 5 | UINT64_C(3) << 17)  // opmask, upper halves of ZMM 0 to 15, ZMM 16 to 31; AMX
#define STATES_AT 512                                // of the header behind the legacy area of XSAVE
#define LIMIT_S 10

static sem_t answered;
static uint64_t written;

static void on_signal(int number, siginfo_t* info, void* context) {
    (void)number, (void)info;
    char* saved = (char*)((ucontext_t*)context)->uc_mcontext.fpregs;
    uint64_t* states = (uint64_t*)(saved + STATES_AT);
    __atomic_fetch_or(&written, *states & WIDE, __ATOMIC_SEQ_CST);
    *states &= ~WIDE;  // the thread goes on with these registers in their initial state
    sem_post(&answered);
}

// The states that any thread has written since the last call, as bits of XCR0; -1 where not all threads answer.
int64_t take_wide_registers(void) {
    const int number = SIGRTMIN + 9;
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigemptyset(&action.sa_mask);
    sigaction(number, &action, NULL);
    sem_init(&answered, 0, 0);
    written = 0;
    DIR* threads = opendir("/proc/self/task");
    if (!threads) return -1;
    int asked = 0;
    for (struct dirent* entry; (entry = readdir(threads));) {
        const long thread = atol(entry->d_name);
        asked += thread > 0 && syscall(SYS_tgkill, getpid(), thread, number) == 0;
    }
    closedir(threads);
    struct timespec latest;
    clock_gettime(CLOCK_REALTIME, &latest);
    latest.tv_sec += LIMIT_S;
    for (; asked > 0; --asked)
        while (sem_timedwait(&answered, &latest) != 0)
            if (errno != EINTR) return -1;
    return (int64_t)written;
}
