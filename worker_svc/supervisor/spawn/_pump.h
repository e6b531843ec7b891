/* One native thread that empties the output pipes of all jobs into their files and holds these to their caps, without the
 * GIL: what a job writes waits for no Python. output_pump.py is the same in Python, and says what the news mean.
 *
 * The thread alone writes to these files, so it knows their sizes: an end that it has not written was truncated.
 * A `struct output` is freed by the thread alone, before it waits: then no event it holds can lead to a freed one.
 */
#ifndef WORKER_SVC_PUMP_H
#define WORKER_SVC_PUMP_H

#include <linux/falloc.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

/* How far past its cap a file may go before its head is given back; as output_guard.py. */
#define PUMP_SLACK_BYTES (4LL * 1024 * 1024)
/* In one go, before another job's turn. */
#define PUMP_PIECE_BYTES (256 * 1024)
#define PUMP_FULL_PAUSE_US 250000
/* Of a disk, what no output takes, or a sixteenth of a small one: what becomes of the jobs must be recorded. */
#define PUMP_LEFT_BYTES (2ULL * 1024 * 1024)
#define PUMP_BURIED_MAX 256

enum { NEWS_EXCEEDED = 1, NEWS_NOT_DROPPED, NEWS_FULL, NEWS_TRUNCATED, NEWS_BROKEN };

struct output {
    pthread_mutex_t lock;
    struct output *next_buried;
    int in, out; /* -1: closed */
    int number;
    int told; /* bits of NEWS_ */
    bool stops, is_broken;
    long long size, dropped, cap, block;
    long long truncated, unwritten; /* bytes lost */
};

static struct { int epoll, bell, null, news, n_buried; pthread_mutex_t lock; struct output *buried; } pump = {
    -1, -1, -1, -1, 0, PTHREAD_MUTEX_INITIALIZER, NULL};

static void pump_tell(struct output *output, int kind, long long value)
{
    struct { int number, kind; long long value; } news = {output->number, kind, value};
    if (!(output->told & 1 << kind) && write(pump.news, &news, sizeof news) == sizeof news)
        output->told |= 1 << kind; /* else the news pipe is full: said at the next occasion */
}

static void pump_drop(struct output *output, long long until)
{
    until = until / output->block * output->block;
    if (until <= output->dropped)
        return;
    if (fallocate(output->out, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, output->dropped, until - output->dropped) == 0)
        output->dropped = until;
    else
        pump_tell(output, NEWS_NOT_DROPPED, errno);
}

/* Somebody truncated the file: goes on at the next block, so that all before it is a hole, which readers are told of. */
static void pump_look_for_truncation(struct output *output)
{
    struct stat found;
    if (fstat(output->out, &found) < 0 || found.st_size >= output->size)
        return;
    output->truncated += output->size - (output->dropped > found.st_size ? output->dropped : found.st_size);
    output->size = (output->size + output->block - 1) / output->block * output->block;
    output->dropped = 0;
    pump_drop(output, output->size);
    pump_tell(output, NEWS_TRUNCATED, output->truncated);
}

static void pump_hold_to_cap(struct output *output)
{
    long long kept = output->size - output->dropped;
    if (!output->cap || kept <= output->cap)
        return;
    if (output->stops)
        pump_tell(output, NEWS_EXCEEDED, output->size);
    if (kept > output->cap + PUMP_SLACK_BYTES)
        pump_drop(output, output->size - output->cap);
}

/* At most so many bytes, from pipe to file. Returns how many; 0: the pipe has no writer any more; -errno. */
static long pump_move(struct output *output, size_t bytes)
{
    if (!output->is_broken) {
        pump_look_for_truncation(output);
        loff_t at = output->size;
        long moved = splice(output->in, NULL, output->out, &at, bytes, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
        int error = errno;
        if (moved > 0) {
            output->size += moved;
            pump_hold_to_cap(output);
        }
        if (moved >= 0 || error == EAGAIN)
            return moved < 0 ? -EAGAIN : moved;
        if (error == ENOSPC || error == EDQUOT) {
            pump_tell(output, NEWS_FULL, error);
            return -error;
        }
        output->is_broken = true;
        pump_tell(output, NEWS_BROKEN, error);
    }
    long gone = splice(output->in, NULL, pump.null, NULL, bytes, SPLICE_F_NONBLOCK);
    if (gone > 0)
        output->unwritten += gone;
    return gone < 0 ? -errno : gone;
}

/* Whether the disk is not as good as full for what is in the pipe. */
static bool pump_has_room(struct output *output)
{
    struct statvfs disk;
    int waiting = 0;
    if (output->is_broken || fstatvfs(output->out, &disk) < 0 || !disk.f_blocks)
        return true;
    unsigned long long left = disk.f_blocks * disk.f_frsize / 16;
    if (disk.f_bavail * disk.f_frsize > (left < PUMP_LEFT_BYTES ? left : PUMP_LEFT_BYTES))
        return true;
    return ioctl(output->in, FIONREAD, &waiting) == 0 && !waiting;
}

static void pump_free_buried(void)
{
    pthread_mutex_lock(&pump.lock);
    struct output *output = pump.buried;
    pump.buried = NULL;
    pump.n_buried = 0;
    pthread_mutex_unlock(&pump.lock);
    while (output) {
        struct output *next = output->next_buried;
        pthread_mutex_destroy(&output->lock);
        free(output);
        output = next;
    }
}

static void pump_close(struct output *output)
{
    /* To close it is not enough: a child of another job, between its clone and its exec, has a copy of every fd, and
     * epoll would go on to report what is freed by then. */
    epoll_ctl(pump.epoll, EPOLL_CTL_DEL, output->in, NULL);
    close(output->in);
    if (output->out >= 0)
        close(output->out);
    output->in = output->out = -1;
}

static void pump_bury(struct output *output)
{
    pthread_mutex_lock(&pump.lock);
    output->next_buried = pump.buried;
    pump.buried = output;
    bool is_many = ++pump.n_buried >= PUMP_BURIED_MAX;
    pthread_mutex_unlock(&pump.lock);
    if (is_many)
        eventfd_write(pump.bell, 1);
}

static void *pump_run(void *unused)
{
    struct epoll_event events[64];
    for (;;) {
        pump_free_buried();
        int n = epoll_wait(pump.epoll, events, sizeof events / sizeof *events, -1);
        bool is_full = false;
        for (int i = 0; i < n; i++) {
            struct output *output = events[i].data.ptr;
            if (!output) {
                eventfd_t count;
                eventfd_read(pump.bell, &count);
                continue;
            }
            pthread_mutex_lock(&output->lock);
            bool is_over = false;
            if (output->in >= 0) {
                long moved = -ENOSPC;
                if (pump_has_room(output))
                    moved = pump_move(output, PUMP_PIECE_BYTES);
                else
                    pump_tell(output, NEWS_FULL, ENOSPC);
                is_full |= moved == -ENOSPC || moved == -EDQUOT;
                if (moved == 0) { /* or it would be reported for ever */
                    epoll_ctl(pump.epoll, EPOLL_CTL_DEL, output->in, NULL);
                    is_over = output->out < 0;
                }
                if (is_over)
                    pump_close(output);
            }
            pthread_mutex_unlock(&output->lock);
            if (is_over)
                pump_bury(output);
        }
        if (is_full)
            usleep(PUMP_FULL_PAUSE_US);
    }
    return unused;
}

PyDoc_STRVAR(pump_start_doc, "pump_start(news_fd)\n\nOnce. news_fd: a pipe for records of (int number, int kind, long long value).");

static PyObject *pump_start(PyObject *module, PyObject *args)
{
    (void)module;
    pthread_t thread;
    pthread_attr_t attributes;
    if (!PyArg_ParseTuple(args, "i", &pump.news))
        return NULL;
    pump.epoll = epoll_create1(EPOLL_CLOEXEC);
    pump.bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pump.null = open("/dev/null", O_WRONLY | O_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN};
    if (pump.epoll < 0 || pump.bell < 0 || pump.null < 0 || epoll_ctl(pump.epoll, EPOLL_CTL_ADD, pump.bell, &event) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    /* No signal is this thread's: they are the loop's, and SIGXFSZ would end us all. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 128 * 1024);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    errno = pthread_create(&thread, &attributes, pump_run, NULL);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (errno)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(pump_add_doc, "pump_add(number, in_fd, out_fd, size, cap, block, stops) -> handle\n\n"
                           "From now on, what is in the pipe goes to the file, from offset `size` on. Takes the fds over.");

static PyObject *pump_add(PyObject *module, PyObject *args)
{
    (void)module;
    struct output *output = calloc(1, sizeof *output);
    int stops;
    if (!output)
        return PyErr_NoMemory();
    if (!PyArg_ParseTuple(args, "iiiLLLp", &output->number, &output->in, &output->out, &output->size, &output->cap,
                          &output->block, &stops)) {
        free(output);
        return NULL;
    }
    output->stops = stops;
    pthread_mutex_init(&output->lock, NULL);
    struct epoll_event event = {.events = EPOLLIN, .data = {.ptr = output}};
    if (epoll_ctl(pump.epoll, EPOLL_CTL_ADD, output->in, &event) < 0) {
        pthread_mutex_destroy(&output->lock);
        free(output);
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    return PyLong_FromVoidPtr(output);
}

/* Takes what is in the pipe now, however much is written meanwhile. */
static void pump_drain(struct output *output)
{
    int left = 0;
    ioctl(output->in, FIONREAD, &left);
    while (left > 0) {
        long moved = pump_move(output, (size_t)left);
        if (moved <= 0)
            break;
        left -= (int)moved;
    }
    output->unwritten += left;
    pump_look_for_truncation(output);
    if (output->cap && !output->stops)
        pump_drop(output, output->size - output->cap);
}

PyDoc_STRVAR(pump_finish_doc, "pump_finish(handle) -> (size, truncated, unwritten)\n\n"
                              "The job has ended: what it wrote is in the file, whoever else holds the pipe; from now on\n"
                              "that one's output is thrown away. The handle is gone.");

static PyObject *pump_finish(PyObject *module, PyObject *handle)
{
    (void)module;
    struct output *output = PyLong_AsVoidPtr(handle);
    if (!output)
        return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_ValueError, "no handle");
    long long size, truncated, unwritten;
    bool is_over;
    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&output->lock);
    pump_drain(output);
    size = output->size, truncated = output->truncated, unwritten = output->unwritten;
    close(output->out);
    output->out = -1;
    output->is_broken = true;
    is_over = splice(output->in, NULL, pump.null, NULL, 1, SPLICE_F_NONBLOCK) == 0;
    if (is_over)
        pump_close(output);
    pthread_mutex_unlock(&output->lock);
    if (is_over)
        pump_bury(output);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("LLL", size, truncated, unwritten);
}

#endif
