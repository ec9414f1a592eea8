/* Loaded into every process of a soak (LD_PRELOAD): moves the clock, fails system calls with an error of
   the file system, and kills the process at its n-th change of files, halfway through a write if asked.

   Only calls that change files count, and only those whose path begins with the control's prefix.  All
   threads are seen, also those of libraries.  soaking/shim.py has the same layout of `control`. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define KINDS 8192

struct control {
    /* Added to the clock of the wall, nanoseconds. */
    volatile int64_t clock;
    /* Whether events count.  At 1 they do; at 2 they do from the first new folder on. */
    volatile int64_t armed;
    volatile int64_t count;
    /* The event at which the process dies, from 1 on; 0: none.  torn: it writes half of it first. */
    volatile int64_t die_at, torn;
    /* errno of every event; 0: none.  failed: how many have failed. */
    volatile int64_t error, failed;
    char prefix[1024];
    /* The kind of each event: o(pen) w(rite) f(sync) r(ename) u(nlink) d(irectory removed) m(kdir) l(ink) t(runcate) */
    char kinds[KINDS];
};

static struct control *control;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

void soak_control(const char *path) {
    int fd = ((int (*)(const char *, int, ...))real("open"))(path, O_RDWR);
    void *found = fd < 0 ? MAP_FAILED : mmap(0, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    control = found == MAP_FAILED ? 0 : found;
    close(fd);
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* errno to fail with, 0 to go on, or -1 to write half and die. */
static int event(char kind, const char *path) {
    struct control *c = control;
    if (!c || !c->prefix[0] || strncmp(path, c->prefix, strlen(c->prefix))) return 0;
    if (c->error) {
        __sync_add_and_fetch(&c->failed, 1);
        return c->error;
    }
    if (c->armed == 2 && kind == 'm') c->armed = 1;
    if (c->armed != 1) return 0;
    int64_t n = __sync_add_and_fetch(&c->count, 1);
    if (n <= KINDS) c->kinds[n - 1] = kind;
    if (n != c->die_at) return 0;
    if (c->torn && kind == 'w') return -1;
    die();
    return 0;
}

static int active(void) { return control && control->prefix[0]; }

static void place(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    out[n > 0 ? n : 0] = 0;
}

static void below(int dir, const char *name, char *out) {
    out[0] = 0;
    if (name[0] != '/' && dir != AT_FDCWD) {
        place(dir, out);
        strncat(out, "/", PATH_MAX - strlen(out) - 1);
    }
    strncat(out, name, PATH_MAX - strlen(out) - 1);
}

static int at(char kind, int dir, const char *name) {
    if (!active()) return 0;
    int before = errno;
    char path[PATH_MAX];
    below(dir, name, path);
    errno = before;
    return event(kind, path);
}

static int of(char kind, int fd) {
    if (!active()) return 0;
    int before = errno;
    char path[PATH_MAX];
    place(fd, path);
    errno = before;
    return event(kind, path);
}

#define OR_FAIL(found)              \
    do {                            \
        int code = (found);         \
        if (code > 0) {             \
            errno = code;           \
            return -1;              \
        }                           \
    } while (0)

/* ---- files */

#define CHANGES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

#define OPENS(name)                                                                       \
    int name(const char *path, int flags, ...) {                                          \
        va_list more;                                                                     \
        va_start(more, flags);                                                            \
        mode_t mode = va_arg(more, mode_t);                                               \
        va_end(more);                                                                     \
        if (CHANGES(flags)) OR_FAIL(at('o', AT_FDCWD, path));                             \
        return ((int (*)(const char *, int, ...))real(#name))(path, flags, mode);         \
    }
#define OPENS_AT(name)                                                                    \
    int name(int dir, const char *path, int flags, ...) {                                 \
        va_list more;                                                                     \
        va_start(more, flags);                                                            \
        mode_t mode = va_arg(more, mode_t);                                               \
        va_end(more);                                                                     \
        if (CHANGES(flags)) OR_FAIL(at('o', dir, path));                                  \
        return ((int (*)(int, const char *, int, ...))real(#name))(dir, path, flags, mode); \
    }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)

ssize_t write(int fd, const void *from, size_t n) {
    static ssize_t (*call)(int, const void *, size_t);
    if (!call) call = REAL(write);
    int code = of('w', fd);
    if (code < 0) {
        call(fd, from, n / 2);
        die();
    }
    OR_FAIL(code);
    return call(fd, from, n);
}

ssize_t writev(int fd, const struct iovec *from, int n) {
    OR_FAIL(of('w', fd));
    return REAL(writev)(fd, from, n);
}

ssize_t pwrite(int fd, const void *from, size_t n, off_t to) {
    OR_FAIL(of('w', fd));
    return REAL(pwrite)(fd, from, n, to);
}

ssize_t pwrite64(int fd, const void *from, size_t n, off64_t to) {
    OR_FAIL(of('w', fd));
    return REAL(pwrite64)(fd, from, n, to);
}

int fsync(int fd) {
    OR_FAIL(of('f', fd));
    return REAL(fsync)(fd);
}

int fdatasync(int fd) {
    OR_FAIL(of('f', fd));
    return REAL(fdatasync)(fd);
}

int ftruncate(int fd, off_t n) {
    OR_FAIL(of('t', fd));
    return REAL(ftruncate)(fd, n);
}

int ftruncate64(int fd, off64_t n) {
    OR_FAIL(of('t', fd));
    return REAL(ftruncate64)(fd, n);
}

/* ---- names */

int rename(const char *a, const char *b) {
    OR_FAIL(at('r', AT_FDCWD, b));
    return REAL(rename)(a, b);
}

int renameat(int da, const char *a, int db, const char *b) {
    OR_FAIL(at('r', db, b));
    return REAL(renameat)(da, a, db, b);
}

int link(const char *a, const char *b) {
    OR_FAIL(at('l', AT_FDCWD, b));
    return REAL(link)(a, b);
}

int linkat(int da, const char *a, int db, const char *b, int flags) {
    OR_FAIL(at('l', db, b));
    return REAL(linkat)(da, a, db, b, flags);
}

int unlink(const char *path) {
    OR_FAIL(at('u', AT_FDCWD, path));
    return REAL(unlink)(path);
}

int unlinkat(int dir, const char *path, int flags) {
    OR_FAIL(at(flags & AT_REMOVEDIR ? 'd' : 'u', dir, path));
    return REAL(unlinkat)(dir, path, flags);
}

int rmdir(const char *path) {
    OR_FAIL(at('d', AT_FDCWD, path));
    return REAL(rmdir)(path);
}

int mkdir(const char *path, mode_t mode) {
    OR_FAIL(at('m', AT_FDCWD, path));
    return REAL(mkdir)(path, mode);
}

int mkdirat(int dir, const char *path, mode_t mode) {
    OR_FAIL(at('m', dir, path));
    return REAL(mkdirat)(dir, path, mode);
}

/* ---- the clock of the wall */

int clock_gettime(clockid_t which, struct timespec *out) {
    static int (*call)(clockid_t, struct timespec *);
    if (!call) call = REAL(clock_gettime);
    int code = call(which, out);
    if (!code && control && control->clock && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE))
        out->tv_sec += control->clock / 1000000000;
    return code;
}

int gettimeofday(struct timeval *restrict out, void *restrict zone) {
    static int (*call)(struct timeval *, void *);
    if (!call) call = real("gettimeofday");
    int code = call(out, zone);
    if (!code && control) out->tv_sec += control->clock / 1000000000;
    return code;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
