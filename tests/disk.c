// A disk that fails from its n-th write on, below every language: LD_PRELOAD has libc's calls pass through here.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char place[4096];
static long first = -1, seen = 0;
static int code = 0;

void disk_fails(const char *folder, long n, int error) {
    strncpy(place, folder, sizeof place - 1);
    first = n, code = error, seen = 0;
}

long disk_seen(void) { return seen; }

static int fails(const char *path) {
    if (!place[0] || !path || strncmp(path, place, strlen(place))) return 0;
    seen++;
    if (first < 0 || seen < first) return 0;
    errno = code;
    return 1;
}

static int fails_at(int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t n = place[0] ? readlink(link, path, sizeof path - 1) : -1;
    if (n < 0) return 0;
    path[n] = 0;
    return fails(path);
}

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int f, const void *b, size_t n) { return fails_at(f) ? -1 : REAL(write)(f, b, n); }
ssize_t writev(int f, const struct iovec *v, int n) { return fails_at(f) ? -1 : REAL(writev)(f, v, n); }
ssize_t pwrite(int f, const void *b, size_t n, off_t o) { return fails_at(f) ? -1 : REAL(pwrite)(f, b, n, o); }
ssize_t pwrite64(int f, const void *b, size_t n, off64_t o) { return fails_at(f) ? -1 : REAL(pwrite64)(f, b, n, o); }
int fsync(int f) { return fails_at(f) ? -1 : REAL(fsync)(f); }
int ftruncate(int f, off_t n) { return fails_at(f) ? -1 : REAL(ftruncate)(f, n); }
int ftruncate64(int f, off64_t n) { return fails_at(f) ? -1 : REAL(ftruncate64)(f, n); }
int mkdir(const char *p, mode_t m) { return fails(p) ? -1 : REAL(mkdir)(p, m); }
int mkdirat(int d, const char *p, mode_t m) { return fails(p) ? -1 : REAL(mkdirat)(d, p, m); }
int rename(const char *a, const char *b) { return fails(b) ? -1 : REAL(rename)(a, b); }
int renameat(int d, const char *a, int e, const char *b) { return fails(b) ? -1 : REAL(renameat)(d, a, e, b); }

#define OPENS(name, given, ...)                              \
    int name(given, int flags, ...) {                        \
        va_list rest;                                        \
        va_start(rest, flags);                               \
        mode_t mode = va_arg(rest, mode_t);                  \
        va_end(rest);                                        \
        if ((flags & O_CREAT) && fails(path)) return -1;     \
        return REAL(name)(__VA_ARGS__, flags, mode);         \
    }
OPENS(open, const char *path, path)
OPENS(open64, const char *path, path)
#define AT int folder, const char *path
int openat(AT, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    return (flags & O_CREAT) && fails(path) ? -1 : REAL(openat)(folder, path, flags, mode);
}
int openat64(AT, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    return (flags & O_CREAT) && fails(path) ? -1 : REAL(openat64)(folder, path, flags, mode);
}
