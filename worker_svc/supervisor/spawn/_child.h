/* The child's half of the native spawner (_native.c): from clone to execve.
 *
 * The parent's calling thread is suspended until the child has executed or ended (CLONE_VFORK), and both share one
 * address space (CLONE_VM): nothing is copied, and the child tells what failed by writing into a struct of the
 * parent's. The price are the rules that every function named child_* keeps (clone(2), vfork(2), signal-safety(7)):
 *   - raw system calls only: libc's wrappers write errno (the parent's thread-local), its setuid() would make every
 *     thread of the *parent* change its user (nptl(7)), and a first call through the PLT would run the dynamic linker;
 *   - no write but to its own stack and to the few fields of `request` that say so;
 *   - no return: the way out is execve or exit_group;
 *   - all signals stay blocked until their dispositions are default: a handler of the parent's must not run here.
 * PR_SET_PDEATHSIG is not used on purpose: jobs outlive the supervisor.
 * A child that changes its user makes the parent non-dumpable: the kernel sets that on the shared address space
 * (commit_creds in kernel/cred.c), and rightly so, or a process of that user could ptrace its way into us in the moment
 * before execve. It is not set back, for another child may be in that moment.
 */
#ifndef WORKER_SVC_CHILD_H
#define WORKER_SVC_CHILD_H

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/sched.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

struct request;
#include "_arch.h"

/* Newer than some headers that we build with. The numbers are the same on every architecture (since Linux 5.0). */
#ifndef SYS_close_range
#define SYS_close_range 436
#endif
#ifndef SYS_openat2
#define SYS_openat2 437
#endif
#ifndef SYS_landlock_create_ruleset
#define SYS_landlock_create_ruleset 444
#define SYS_landlock_add_rule 445
#define SYS_landlock_restrict_self 446
#endif

/* Kept in step with steps.py: Op. */
enum { OP_WRITE = 1, OP_RLIMIT, OP_NICE, OP_AFFINITY, OP_UMASK, OP_UNSHARE, OP_PRIVATE_TMP, OP_LOOPBACK, OP_GROUPS,
       OP_GID, OP_UID, OP_CLEAR_AMBIENT, OP_CHDIR, OP_NO_NEW_PRIVS, OP_LANDLOCK, OP_LANDLOCK_RULE, OP_LANDLOCK_ENFORCE,
       OP_HIDE, OP_SECCOMP };

/* What failed, where it was none of the steps. Kept in step with steps.py: Place. */
enum { AT_NONE = -1, AT_CLONE = -2, AT_CGROUP = -3, AT_SESSION = -4, AT_FDS = -5, AT_EXEC = -6, AT_KILLED = -7 };

struct step {
    int op;
    long long a, b, c;
    const char *data;
    Py_ssize_t size;
};

struct request {
    const char **candidates, **argv, **envp;
    struct step *steps;
    Py_ssize_t n_steps;
    int fds[3];
    int cgroup_fd;
    int exec_fd;      /* the program itself, instead of what the candidates' names lead to by then; -1: by name */
    bool join_cgroup; /* the child has to move itself: it could not be born there */
    int pidfd;        /* written by the kernel; if clone fails after that, it is a number and no fd */
    /* Written by the child: */
    volatile int *slot; /* [0] the pidfd, for other threads, now that it surely is one; [1] is the caller's */
    struct timespec born;
    int failed, error, candidate;
};

/* linux/landlock.h may be too old or missing where we are built. */
struct landlock_ruleset { uint64_t handled_access_fs, handled_access_net, scoped; };
struct landlock_path { uint64_t allowed_access; int32_t parent_fd; } __attribute__((packed));
struct filter { unsigned short size; const char *steps; };
struct open_how { uint64_t flags, mode, resolve; };
enum { RESOLVE_NO_SYMLINKS = 4 };
struct kernel_sigaction { void *handler; unsigned long flags; void *restorer; uint64_t mask; };
struct linux_dirent { uint64_t ino; int64_t off; unsigned short size; unsigned char type; char name[]; };

static long child_write(int dir_fd, const char *path, const char *text, long size)
{
    long fd = RAW(SYS_openat, dir_fd, path, O_WRONLY | O_CLOEXEC, 0, 0);
    if (fd < 0)
        return fd;
    long result = RAW(SYS_write, fd, text, size, 0, 0);
    RAW(SYS_close, fd, 0, 0, 0, 0);
    return result < 0 ? result : result == size ? 0 : -EIO;
}

/* Onto 0, 1 and 2. Sources that are 0, 1 or 2 themselves (a parent with closed ones) are moved out of the way first. */
static long child_fds(const int *fds)
{
    long high[3];
    for (int i = 0; i < 3; i++) {
        high[i] = fds[i] > 2 ? fds[i] : RAW(SYS_fcntl, fds[i], F_DUPFD_CLOEXEC, 3, 0, 0);
        if (high[i] < 0)
            return high[i];
    }
    for (int i = 0; i < 3; i++) {
        long result = RAW(SYS_dup3, high[i], i, 0, 0, 0);
        if (result < 0)
            return result;
    }
    return 0;
}

/* Where the program's fd is kept until it is executed. */
enum { EXEC_FD = 3 };

/* No fd but 0, 1, 2 (and EXEC_FD, which execve closes). Without close_range (Linux 5.9; older container profiles refuse it) one by one, by /proc. */
static long child_close_rest(bool keeps_exec_fd)
{
    if (RAW(SYS_close_range, keeps_exec_fd ? EXEC_FD + 1 : EXEC_FD, ~0U, 0, 0, 0) == 0)
        return 0;
    char buffer[2048] __attribute__((aligned(8)));
    long dir = RAW(SYS_openat, AT_FDCWD, "/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0, 0);
    if (dir < 0)
        return dir;
    long size;
    while ((size = RAW(SYS_getdents64, dir, buffer, sizeof buffer, 0, 0)) > 0) {
        for (long at = 0; at < size;) {
            const struct linux_dirent *entry = (const struct linux_dirent *)(buffer + at);
            long fd = 0;
            for (const char *digit = entry->name; *digit >= '0' && *digit <= '9'; digit++)
                fd = fd * 10 + (*digit - '0');
            if (fd > 2) /* marked, not closed: that would make the directory skip entries */
                RAW(SYS_fcntl, fd, F_SETFD, FD_CLOEXEC, 0, 0);
            at += entry->size;
        }
    }
    RAW(SYS_close, dir, 0, 0, 0, 0);
    return size;
}

/* Every disposition to default, ignored ones too: CLONE_CLEAR_SIGHAND and execve leave those (signal(7)). */
static void child_default_signals(void)
{
    struct kernel_sigaction action = {0, 0, 0, 0};
    for (int number = 1; number <= 64; number++)
        if (number != SIGKILL && number != SIGSTOP)
            RAW(SYS_rt_sigaction, number, &action, 0, sizeof action.mask, 0);
    uint64_t none = 0;
    RAW(SYS_rt_sigprocmask, SIG_SETMASK, &none, 0, sizeof none, 0);
}

/* The kernel narrows the set to the CPUs that the cpuset allows, without a word: so we look (sched_setaffinity(2)). */
static long child_affinity(const char *mask, long size)
{
    long result = RAW(SYS_sched_setaffinity, 0, size, mask, 0, 0);
    if (result < 0)
        return result;
    unsigned char now[1024] __attribute__((aligned(8)));
    long got = RAW(SYS_sched_getaffinity, 0, sizeof now, now, 0, 0);
    if (got < 0)
        return got;
    for (long i = 0; i < got || i < size; i++)
        if ((i < got ? now[i] : 0) != (i < size ? (unsigned char)mask[i] : 0))
            return -EINVAL;
    return 0;
}

/* New namespaces. Without privilege in a user namespace where our own ids are mapped to themselves, if the caller gave
 * the two map lines (user_namespaces(7): setgroups has to be denied before gid_map may be written). */
static long child_unshare(const struct step *step)
{
    long result = RAW(SYS_unshare, step->a, 0, 0, 0, 0);
    if (result != -EPERM || !step->size)
        return result;
    result = RAW(SYS_unshare, step->a | CLONE_NEWUSER, 0, 0, 0, 0);
    if (result == 0)
        result = child_write(AT_FDCWD, "/proc/self/setgroups", "deny", 4);
    if (result == 0)
        result = child_write(AT_FDCWD, "/proc/self/uid_map", step->data, step->b);
    if (result == 0)
        result = child_write(AT_FDCWD, "/proc/self/gid_map", step->data + step->b, step->size - step->b);
    return result;
}

static long child_cover(const char *path, long flags, const char *mode)
{
    /* Slave: what the host mounts later is seen, what is mounted here is not seen there (mount_namespaces(7)). */
    long result = RAW(SYS_mount, 0, "/", 0, MS_REC | MS_SLAVE, 0);
    if (result < 0)
        return result;
    return RAW(SYS_mount, "tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV | flags, mode);
}

/* Puts an empty directory in the place of one, where that may be done: it is one wall more, and not asked for by name. Not
 * for its sake in a user namespace, where other users' files are nobody's: ssh(1), for one, runs in none. */
static long child_hide(const struct step *step)
{
    long result = step->a ? RAW(SYS_unshare, step->a, 0, 0, 0, 0) : 0;
    if (result == 0)
        result = child_cover(step->data, MS_NOEXEC | MS_RDONLY, "mode=700");
    return result == -EPERM || result == -EACCES || result == -ENOENT ? 0 : result;
}

static long child_loopback(void)
{
    struct ifreq request;
    volatile char *byte = (volatile char *)&request; /* volatile: or the compiler makes this a call of memset */
    for (size_t i = 0; i < sizeof request; i++)
        byte[i] = 0;
    request.ifr_name[0] = 'l';
    request.ifr_name[1] = 'o';
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    long fd = RAW(SYS_socket, 2 /* AF_INET */, 2 /* SOCK_DGRAM */ | O_CLOEXEC, 0, 0, 0);
    if (fd < 0)
        return fd;
    long result = RAW(SYS_ioctl, fd, 0x8914 /* SIOCSIFFLAGS */, &request, 0, 0);
    RAW(SYS_close, fd, 0, 0, 0, 0);
    return result;
}

/* Landlock rights (landlock(7)): bits 0 to 12 are ABI 1, then REFER, TRUNCATE (ABI 3), IOCTL_DEV (ABI 5), RESOLVE_UNIX
 * (ABI 9: to connect to a socket by its path). */
enum {
    LANDLOCK_READ = 1 << 0 | 1 << 2 | 1 << 3,
    LANDLOCK_FILE = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15 | 1 << 16,
};

/* From ABI 6 on without a way to who is outside, by abstract sockets (1) or by signals (2). Without files, and where there
 * is nothing else to restrict, no ruleset: -1. */
static long child_landlock(const struct step *step, long *ruleset_fd, uint64_t *handled)
{
    bool is_of_files = step->b != 0;
    long abi = RAW(SYS_landlock_create_ruleset, 0, 0, 1, 0, 0);
    if (!is_of_files && abi < 6)
        return 0;
    if (abi < 0)
        return abi;
    if (abi < step->a)
        return -EOPNOTSUPP;
    *handled = !is_of_files ? 0 : abi >= 9 ? 0x1ffff : abi >= 5 ? 0xffff : 0x7fff;
    struct landlock_ruleset ruleset = {*handled, 0, abi >= 6 ? 3 : 0};
    long size = abi >= 6 ? sizeof ruleset : sizeof ruleset.handled_access_fs;
    *ruleset_fd = RAW(SYS_landlock_create_ruleset, &ruleset, size, 0, 0, 0);
    return *ruleset_fd < 0 ? *ruleset_fd : 0;
}

static long child_landlock_rule(long ruleset, uint64_t handled, bool writable, bool no_links, const char *path)
{
    struct open_how how = {O_PATH | O_CLOEXEC, 0, RESOLVE_NO_SYMLINKS};
    long fd = no_links ? RAW(SYS_openat2, AT_FDCWD, path, &how, sizeof how, 0)
                       : RAW(SYS_openat, AT_FDCWD, path, O_PATH | O_CLOEXEC, 0, 0);
    if (fd < 0)
        return fd;
    struct landlock_path rule = {writable ? handled : LANDLOCK_READ, (int32_t)fd};
    long result = RAW(SYS_landlock_add_rule, ruleset, 1, &rule, 0, 0);
    if (result == -EINVAL) { /* a file: it takes no right of a directory */
        rule.allowed_access &= LANDLOCK_FILE;
        result = RAW(SYS_landlock_add_rule, ruleset, 1, &rule, 0, 0);
    }
    RAW(SYS_close, fd, 0, 0, 0, 0);
    return result;
}

/* By its path, as chdir(2) does it for this user. Then we are there for good, and see where that is: `inode` 0, or the
 * very directory that was meant, under the very path. */
static long child_chdir(const char *path, uint64_t device, uint64_t inode)
{
    long result = RAW(SYS_chdir, path, 0, 0, 0, 0);
    if (result < 0 || !inode)
        return result;
    struct stat found;
    result = RAW(SYS_newfstatat, AT_FDCWD, ".", &found, 0, 0);
    if (result < 0)
        return result;
    char now[PATH_MAX];
    long size = RAW(SYS_getcwd, now, sizeof now, 0, 0, 0);
    if (size < 0)
        return size;
    bool is_same = found.st_dev == device && found.st_ino == inode;
    for (long i = 0; i < size && is_same; i++)
        is_same = now[i] == path[i];
    return is_same ? 0 : -ESTALE;
}

static long child_step(const struct step *step, long *ruleset, uint64_t *handled)
{
    switch (step->op) {
    case OP_WRITE: /* data: the path, NUL, b bytes of text */
        return child_write(AT_FDCWD, step->data, step->data + step->size - step->b, step->b);
    case OP_RLIMIT: {
        uint64_t limit[2] = {(uint64_t)step->b, (uint64_t)step->c};
        return RAW(SYS_prlimit64, 0, step->a, limit, 0, 0);
    }
    case OP_NICE:
        return RAW(SYS_setpriority, PRIO_PROCESS, 0, step->a, 0, 0);
    case OP_AFFINITY:
        return child_affinity(step->data, step->size);
    case OP_UMASK:
        RAW(SYS_umask, step->a, 0, 0, 0, 0);
        return 0;
    case OP_UNSHARE:
        return child_unshare(step);
    case OP_HIDE: /* a: as of UNSHARE */
        return child_hide(step);
    case OP_PRIVATE_TMP:
        return child_cover("/tmp", 0, "mode=1777");
    case OP_LOOPBACK:
        return child_loopback();
    case OP_GROUPS:
        return RAW(SYS_setgroups, step->size / (long)sizeof(gid_t), step->data, 0, 0, 0);
    case OP_GID:
        return RAW(SYS_setresgid, step->a, step->a, step->a, 0, 0);
    case OP_UID:
        return RAW(SYS_setresuid, step->a, step->a, step->a, 0, 0);
    case OP_CLEAR_AMBIENT:
        return RAW(SYS_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    case OP_CHDIR:
        return child_chdir(step->data, (uint64_t)step->a, (uint64_t)step->b);
    case OP_NO_NEW_PRIVS:
        return RAW(SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    case OP_SECCOMP: { /* data: its steps of 8 bytes; none where we know of none */
        struct filter filter = {(unsigned short)(step->size / 8), step->data};
        long result = step->size ? RAW(SYS_seccomp, 1 /* SET_MODE_FILTER */, 4 /* SPEC_ALLOW */, &filter, 0, 0) : 0;
        return result == -EINVAL || result == -ENOSYS ? 0 : result; /* one wall less, as where Landlock has no scopes */
    }
    case OP_LANDLOCK:
        return child_landlock(step, ruleset, handled);
    case OP_LANDLOCK_RULE:
        return child_landlock_rule(*ruleset, *handled, step->a != 0, step->b != 0, step->data);
    case OP_LANDLOCK_ENFORCE:
        return *ruleset < 0 ? 0 : RAW(SYS_landlock_restrict_self, *ruleset, 0, 0, 0, 0);
    }
    return -ENOSYS;
}

/* As execvp(3): on to the next one if this is not there or not ours to run. Returns only what went wrong. */
static long child_exec(struct request *request)
{
    long refused = 0, error = -ENOENT;
    if (request->exec_fd >= 0) {
        error = RAW(SYS_execveat, EXEC_FD, "", request->argv, request->envp, AT_EMPTY_PATH);
        /* ENOENT: a script, whose interpreter could not open an fd that is closed by then (execveat(2)): by its name. */
        if (error != -ENOENT && error != -ENOSYS)
            return error;
    }
    for (int i = 0; request->candidates[i]; i++) {
        error = RAW(SYS_execve, request->candidates[i], request->argv, request->envp, 0, 0);
        if (error == -EACCES && !refused) {
            refused = error;
            request->candidate = i;
        } else if (error != -EACCES && error != -ENOENT && error != -ENOTDIR) {
            request->candidate = i;
            return error;
        }
    }
    return refused ? refused : error;
}

static void child_main(struct request *request)
{
    long result = 0, ruleset = -1;
    uint64_t handled = 0;
    int at = AT_CGROUP;
    RAW(SYS_clock_gettime, CLOCK_BOOTTIME, &request->born, 0, 0, 0);
    request->slot[0] = request->pidfd;
    if (request->join_cgroup)
        result = child_write(request->cgroup_fd, "cgroup.procs", "0", 1);
    if (result >= 0) {
        at = AT_SESSION;
        result = RAW(SYS_setsid, 0, 0, 0, 0, 0);
    }
    long exec_fd = request->exec_fd;
    if (result >= 0 && exec_fd >= 0) { /* out of the way of the others */
        at = AT_FDS;
        result = exec_fd = RAW(SYS_fcntl, exec_fd, F_DUPFD_CLOEXEC, EXEC_FD + 1, 0, 0);
    }
    if (result >= 0) {
        at = AT_FDS;
        result = child_fds(request->fds);
    }
    if (result >= 0 && exec_fd >= 0)
        result = RAW(SYS_dup3, exec_fd, EXEC_FD, O_CLOEXEC, 0, 0);
    if (result >= 0) /* before the steps: one may leave room for no more than a few fds */
        result = child_close_rest(exec_fd >= 0);
    for (Py_ssize_t i = 0; i < request->n_steps && result >= 0; i++) {
        at = (int)i;
        result = child_step(&request->steps[i], &ruleset, &handled);
    }
    if (result >= 0) {
        child_default_signals();
        at = AT_EXEC;
        result = child_exec(request);
    }
    request->error = (int)-result;
    request->failed = at;
    for (;;)
        RAW(SYS_exit_group, 127, 0, 0, 0, 0);
}

#endif
