/* The native spawner: from a prepared plan to a running process, in one vfork-style clone. The rules are in _child.h.
 *
 * The GIL is released meanwhile: other threads of the parent run on, so that a program on a dead file system holds up
 * the one thread that starts it. The order of the child's steps is the caller's (steps.py, which says why).
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "_child.h"
#include "_pump.h"

/* Newer than some headers that we build with. */
#ifndef SYS_clone3
#define SYS_clone3 435
#endif
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef CLONE_PIDFD
#define CLONE_PIDFD 0x00001000
#endif
#ifndef CLONE_INTO_CGROUP
#define CLONE_INTO_CGROUP 0x200000000ULL
#endif

/* The child needs some 4 KiB; with sanitizers, more. Below it lies what faults; both are of whole pages where those are of
 * 64 KiB too (aarch64). */
#define STACK_BYTES (64 * 1024)
#define GUARD_BYTES (64 * 1024)

/* As clone_args in linux/sched.h; its first 64 bytes are what Linux 5.3 knows, `cgroup` ends the 88 of Linux 5.7. */
struct clone_arguments {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};

/* Returns the pid or -errno. */
static long clone_child(struct request *request, char *stack, size_t stack_size)
{
    const uint64_t flags = CLONE_VM | CLONE_VFORK | CLONE_PIDFD;
    struct clone_arguments arguments = {0};
    arguments.flags = flags;
    arguments.pidfd = (uintptr_t)&request->pidfd;
    arguments.exit_signal = SIGCHLD;
    arguments.stack = (uintptr_t)stack;
    arguments.stack_size = stack_size;
    size_t size = 64;
    if (request->cgroup_fd >= 0) {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = (uint64_t)request->cgroup_fd;
        size = sizeof arguments;
    }
    long pid = clone_into(SYS_clone3, (long)(uintptr_t)&arguments, (long)size, 0, child_main, request);
    if (pid != -ENOSYS && pid != -EPERM && pid != -E2BIG && pid != -EINVAL)
        return pid;
    /* No clone3 (Linux 5.3; container runtimes refuse it, as seccomp cannot look into its arguments) or none that knows
     * cgroups (5.7). Then the child moves itself before anything else: no code of the job's has run by then either. */
    request->join_cgroup = request->cgroup_fd >= 0;
    request->pidfd = -1;
    return clone_into(SYS_clone, (long)(flags | SIGCHLD), (long)(uintptr_t)(stack + stack_size),
                      (long)(uintptr_t)&request->pidfd, child_main, request);
}

/* Fields 9 (flags) and 22 (start time) of /proc/PID/stat (proc_pid_stat(5)). 0: all read. */
static int read_stat(long pid, unsigned long *flags, unsigned long long *start_ticks)
{
    char path[40], text[1024];
    snprintf(path, sizeof path, "/proc/%ld/stat", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t size = read(fd, text, sizeof text - 1);
    close(fd);
    text[size > 0 ? size : 0] = 0;
    char *rest = strrchr(text, ')'); /* the name in field 2 can hold spaces and brackets */
    if (!rest || sscanf(rest + 1, " %*c %*d %*d %*d %*d %*d %lu %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %llu",
                        flags, start_ticks) != 2)
        return -1;
    return 0;
}

struct result { long pid; int pidfd; unsigned long long start_ticks; };

/* In which tick of 10 ms (USER_HZ is 100 on x86 and ARM) the child was born: the kernel took the time of its birth from
 * CLOCK_BOOTTIME (copy_process in kernel/fork.c) after we looked and before the child did. 0: a tick ended in between, or
 * that clock and /proc did not agree at first sight (an emulated kernel). Reading /proc/PID/stat takes some 40 us. */
static unsigned long long ticks_by_clock(const struct timespec *before, const struct timespec *after)
{
    unsigned long long first = (unsigned long long)before->tv_sec * 100 + (unsigned long long)before->tv_nsec / 10000000;
    unsigned long long last = (unsigned long long)after->tv_sec * 100 + (unsigned long long)after->tv_nsec / 10000000;
    return first == last ? first : 0;
}

enum { CLOCK_UNTRIED, CLOCK_AGREES, CLOCK_DIFFERS };
static atomic_int clock_is = CLOCK_UNTRIED;

/* Whether the child, which did not say that it failed, may have been killed before it executed: it is dead, or about to
 * be as the caller wished. Killed by another and still ending, it counts as started and killed by that signal. */
static bool may_be_killed(long pid, const volatile int *slot)
{
    siginfo_t info;
    info.si_pid = 0;
    return slot[1] || waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT | __WALL) < 0 || info.si_pid;
}

/* True: it executed; then its start time is in `result`. */
static bool has_executed(long pid, const struct request *request, const struct timespec *before, struct result *result)
{
    unsigned long long by_clock = ticks_by_clock(before, &request->born);
    int is = atomic_load(&clock_is);
    if (by_clock && is == CLOCK_AGREES && !may_be_killed(pid, request->slot)) {
        result->start_ticks = by_clock;
        return true;
    }
    unsigned long flags = 0;
    if (read_stat(pid, &flags, &result->start_ticks) < 0)
        return true;
    if (by_clock && is == CLOCK_UNTRIED)
        atomic_store(&clock_is, by_clock == result->start_ticks ? CLOCK_AGREES : CLOCK_DIFFERS);
    /* Killed before it could: then it exits (0x4, PF_EXITING) and "forked but didn't exec" (0x40, PF_FORKNOEXEC;
     * include/linux/sched.h). With the latter alone it is just past the point of no return (begin_new_exec in fs/exec.c). */
    return (flags & 0x44) != 0x44;
}

/* Each thread keeps the stack that it gives to its children, one after the other: mapping one takes 10 us. */
static pthread_key_t stack_key;
static bool stack_key_is_made = false;

static void unmap_stack(void *mapped) { munmap(mapped, GUARD_BYTES + STACK_BYTES); }

/* NULL: errno says why. */
static char *stack_of_this_thread(void)
{
    char *mapped = pthread_getspecific(stack_key);
    if (mapped)
        return mapped;
    mapped = mmap(NULL, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED)
        return NULL;
    int error = mprotect(mapped, GUARD_BYTES, PROT_NONE) < 0 ? errno : pthread_setspecific(stack_key, mapped);
    if (!error)
        return mapped;
    unmap_stack(mapped);
    errno = error;
    return NULL;
}

static void run(struct request *request, struct result *result)
{
    result->pid = 0;
    result->pidfd = -1;
    result->start_ticks = 0;
    char *mapped = stack_of_this_thread();
    if (!mapped) {
        request->failed = AT_CLONE;
        request->error = errno;
        return;
    }
    /* All of them, and by the raw call: libc's leaves out the two that it uses itself (nptl(7)). */
    uint64_t all = ~0ULL, signals_before = 0;
    RAW(SYS_rt_sigprocmask, SIG_SETMASK, &all, &signals_before, sizeof all, 0);
    struct timespec before;
    clock_gettime(CLOCK_BOOTTIME, &before);
    long pid = clone_child(request, mapped + GUARD_BYTES, STACK_BYTES);
    RAW(SYS_rt_sigprocmask, SIG_SETMASK, &signals_before, 0, sizeof signals_before, 0);
#if defined(__SANITIZE_ADDRESS__)
    /* The child never left its functions, so the red zones in its frames are still marked as such. */
    __asan_unpoison_memory_region(mapped + GUARD_BYTES, STACK_BYTES);
#endif
    if (pid < 0) {
        request->failed = AT_CLONE;
        request->error = (int)-pid;
        return;
    }
    result->pidfd = request->pidfd >= 0 ? request->pidfd : (int)syscall(SYS_pidfd_open, pid, 0);
    if (request->failed == AT_NONE) {
        if (has_executed(pid, request, &before, result)) {
            result->pid = pid;
            return;
        }
        request->failed = AT_KILLED;
    }
    int status = 0;
    while (wait4((pid_t)pid, &status, __WALL, NULL) < 0 && errno == EINTR)
        ;
    if (request->failed == AT_KILLED)
        request->error = WTERMSIG(status);
}

static const char **strings_of(PyObject *tuple)
{
    Py_ssize_t count = PyTuple_Size(tuple);
    if (count < 0)
        return NULL;
    const char **strings = PyMem_Calloc((size_t)count + 1, sizeof *strings);
    if (!strings) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        char *text;
        /* a NULL length: refuses NULs within */
        if (PyBytes_AsStringAndSize(PyTuple_GetItem(tuple, i), &text, NULL) < 0) {
            PyMem_Free(strings);
            return NULL;
        }
        strings[i] = text;
    }
    return strings;
}

static struct step *steps_of(PyObject *tuple, Py_ssize_t *count)
{
    *count = PyTuple_Size(tuple);
    if (*count < 0)
        return NULL;
    struct step *steps = PyMem_Calloc((size_t)*count + 1, sizeof *steps);
    if (!steps) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < *count; i++) {
        struct step *step = &steps[i];
        if (!PyTuple_Check(PyTuple_GetItem(tuple, i))) {
            PyErr_SetString(PyExc_TypeError, "a step must be a tuple");
            PyMem_Free(steps);
            return NULL;
        }
        if (!PyArg_ParseTuple(PyTuple_GetItem(tuple, i), "iLLLy#", &step->op, &step->a, &step->b, &step->c, &step->data,
                              &step->size)) {
            PyMem_Free(steps);
            return NULL;
        }
        if (step->op == OP_WRITE || step->op == OP_UNSHARE ? step->b < 0 || step->b > step->size : false) {
            PyErr_SetString(PyExc_ValueError, "a step's size exceeds its data");
            PyMem_Free(steps);
            return NULL;
        }
    }
    return steps;
}

PyDoc_STRVAR(spawn_doc, "spawn(candidates, argv, envp, steps, (stdin, stdout, stderr), cgroup_fd, slot, exec_fd=-1)\n"
                        "-> (pid, pidfd, start_ticks, failed, errno, candidate)\n\n"
                        "pid 0: it failed; the child is reaped, the pidfd the caller's to close. slot: a writable\n"
                        "buffer of two ints: the pidfd, as soon as the child is there; and not 0 once the caller\n"
                        "kills it. exec_fd: the program, opened; the candidates then serve for scripts only.");

static PyObject *spawn(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *candidates, *argv, *envp, *steps;
    Py_buffer slot;
    struct request request = {.failed = AT_NONE, .pidfd = -1, .exec_fd = -1};
    if (!PyArg_ParseTuple(args, "O!O!O!O!(iii)iw*|i", &PyTuple_Type, &candidates, &PyTuple_Type, &argv, &PyTuple_Type, &envp,
                          &PyTuple_Type, &steps, &request.fds[0], &request.fds[1], &request.fds[2], &request.cgroup_fd,
                          &slot, &request.exec_fd))
        return NULL;
    PyObject *answer = NULL;
    if (slot.len != 2 * sizeof(int)) {
        PyErr_SetString(PyExc_ValueError, "slot must be of two ints");
        goto out;
    }
    if ((request.candidates = strings_of(candidates)) && (request.argv = strings_of(argv)) &&
        (request.envp = strings_of(envp)) && (request.steps = steps_of(steps, &request.n_steps))) {
        struct result result;
        request.slot = slot.buf;
        request.slot[0] = -1;
        Py_BEGIN_ALLOW_THREADS
        run(&request, &result);
        Py_END_ALLOW_THREADS
        answer = Py_BuildValue("liKiii", result.pid, result.pidfd, result.start_ticks, request.failed, request.error,
                               request.candidate);
    }
out:
    PyMem_Free(request.candidates);
    PyMem_Free(request.argv);
    PyMem_Free(request.envp);
    PyMem_Free(request.steps);
    PyBuffer_Release(&slot);
    return answer;
}

PyDoc_STRVAR(subreaper_doc, "Makes this process the one that orphaned descendants fall to (PR_SET_CHILD_SUBREAPER).");

static PyObject *set_child_subreaper(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"spawn", spawn, METH_VARARGS, spawn_doc},
    {"set_child_subreaper", set_child_subreaper, METH_NOARGS, subreaper_doc},
    {"pump_start", pump_start, METH_VARARGS, pump_start_doc},
    {"pump_add", pump_add, METH_VARARGS, pump_add_doc},
    {"pump_finish", pump_finish, METH_O, pump_finish_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "worker_svc.supervisor.spawn._native", NULL, 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void);
PyMODINIT_FUNC PyInit__native(void)
{
    if (!stack_key_is_made && pthread_key_create(&stack_key, unmap_stack) != 0)
        return PyErr_NoMemory();
    stack_key_is_made = true;
    return PyModuleDef_Init(&definition);
}
