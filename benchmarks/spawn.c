/* The yardstick of the benchmarks: posix_spawn of /bin/true with its output in a fresh file, argv[2] at once (1).
 * Reads a count from each line of standard input, answers with the seconds it took, and those of CPU. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static void start(const char *folder, int number)
{
    char path[256];
    snprintf(path, sizeof path, "%s/c-%d", folder, number);
    int in = open("/dev/null", O_RDONLY | O_CLOEXEC);
    int out = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in, 0);
    posix_spawn_file_actions_adddup2(&actions, out, 1);
    posix_spawn_file_actions_adddup2(&actions, out, 2);
    char *argv[] = {"/bin/true", NULL};
    pid_t pid;
    if (in < 0 || out < 0 || posix_spawn(&pid, argv[0], &actions, NULL, argv, environ) != 0)
        exit(1);
    posix_spawn_file_actions_destroy(&actions);
    close(in);
    close(out);
    unlink(path);
}

static void reap(void)
{
    int status;
    if (wait(&status) < 0 || status != 0)
        exit(1);
}

static double cpu(int who)
{
    struct rusage usage;
    getrusage(who, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

int main(int argc, char **argv)
{
    int count;
    if (argc != 2 && argc != 3)
        return 2;
    int at_once = argc == 3 ? atoi(argv[2]) : 1;
    while (scanf("%d", &count) == 1) {
        struct timespec begun, ended;
        double used = cpu(RUSAGE_SELF) + cpu(RUSAGE_CHILDREN);
        clock_gettime(CLOCK_MONOTONIC, &begun);
        for (int i = 0; i < count; i++) {
            if (i >= at_once)
                reap();
            start(argv[1], i);
        }
        for (int i = count < at_once ? count : at_once; i > 0; i--)
            reap();
        clock_gettime(CLOCK_MONOTONIC, &ended);
        printf("%.9f %.9f\n", (double)(ended.tv_sec - begun.tv_sec) + (double)(ended.tv_nsec - begun.tv_nsec) / 1e9,
               cpu(RUSAGE_SELF) + cpu(RUSAGE_CHILDREN) - used);
        fflush(stdout);
    }
    return 0;
}
