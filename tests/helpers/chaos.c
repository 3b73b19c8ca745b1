/* A preloaded library that ends the process, or fails a call, at a chosen change of the files below a folder.

   tests/helpers/chaos.py builds it, and arms it in a forked process. Each call of the C library that changes a file below the
   folder counts; of those that an error is for (writes, fsync and rename) there is a count of its own. glibc only. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TEAR, FULL, BROKEN }; /* TEAR: killed amid a write. FULL: from then on. BROKEN: one EIO. */

static char folder[PATH_MAX];
static size_t length;
static int mode;
static long at;
static atomic_long changes, failures; /* of any kind; of a kind that can fail */
static atomic_int is_full;

void chaos_arm(const char *path, int what, long number) {
  length = strlen(path);
  memcpy(folder, path, length + 1);
  mode = what;
  at = number;
  changes = failures = is_full = 0;
}

long chaos_changes(void) { return changes; }
long chaos_failures(void) { return failures; }

static int is_below(const char *path) {
  return strncmp(path, folder, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static int is_ours(int descriptor) {
  char link[64], path[PATH_MAX];
  if (!length) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t size = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return is_below(path);
}

static int is_ours_at(int descriptor, const char *path) {
  return length && (path[0] == '/' || descriptor == AT_FDCWD ? is_below(path) : is_ours(descriptor));
}

static void end(void) {
  syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
  for (;;) pause();
}

/* A change that cannot be made to fail. */
static void change(void) {
  long number = ++changes;
  if ((mode == KILL || mode == TEAR) && number == at) end();
}

/* A change that can: the error to report, or 0. is_write: it needs room. */
static int fail(int is_write) {
  long number = ++failures;
  change();
  if (mode == BROKEN && number == at) return EIO;
  if (mode == FULL && number == at) is_full = 1;
  return mode == FULL && (number == at || (is_full && is_write)) ? ENOSPC : 0;
}

/* Bytes to write first of those that a write was to write, where it is to be torn; else 0. */
static size_t torn(size_t size) {
  if (mode == TEAR && changes + 1 == at) return size / 2;
  if (mode == FULL && failures + 1 == at) return size / 2; /* a disk takes what it has room for */
  return 0;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL(is_write)              \
  do {                              \
    int error = fail(is_write);     \
    if (error) {                    \
      errno = error;                \
      return -1;                    \
    }                               \
  } while (0)

ssize_t write(int descriptor, const void *data, size_t size) {
  REAL(write);
  if (!is_ours(descriptor)) return real(descriptor, data, size);
  size_t part = torn(size);
  ssize_t written = part ? real(descriptor, data, part) : 0;
  int error = fail(1);
  if (part) return written;
  if (error) return errno = error, -1;
  return real(descriptor, data, size);
}

#define PWRITE(name)                                                              \
  ssize_t name(int descriptor, const void *data, size_t size, off_t offset) {     \
    REAL(name);                                                                   \
    if (!is_ours(descriptor)) return real(descriptor, data, size, offset);        \
    size_t part = torn(size);                                                     \
    ssize_t written = part ? real(descriptor, data, part, offset) : 0;            \
    int error = fail(1);                                                          \
    if (part) return written;                                                     \
    if (error) return errno = error, -1;                                          \
    return real(descriptor, data, size, offset);                                  \
  }
PWRITE(pwrite)
PWRITE(pwrite64)

#define WRITEV(name, parameters, arguments)      \
  ssize_t name parameters {                      \
    REAL(name);                                  \
    if (is_ours(descriptor)) FAIL(1);            \
    return real arguments;                       \
  }
WRITEV(writev, (int descriptor, const struct iovec *parts, int count), (descriptor, parts, count))
WRITEV(pwritev, (int descriptor, const struct iovec *parts, int count, off_t offset), (descriptor, parts, count, offset))
WRITEV(pwritev64, (int descriptor, const struct iovec *parts, int count, off_t offset), (descriptor, parts, count, offset))
WRITEV(sendfile, (int descriptor, int from, off_t *offset, size_t size), (descriptor, from, offset, size))
WRITEV(sendfile64, (int descriptor, int from, off_t *offset, size_t size), (descriptor, from, offset, size))

ssize_t copy_file_range(int from, off_t *from_offset, int descriptor, off_t *offset, size_t size, unsigned flags) {
  REAL(copy_file_range);
  if (is_ours(descriptor)) FAIL(1);
  return real(from, from_offset, descriptor, offset, size, flags);
}

#define SYNC(name)                       \
  int name(int descriptor) {             \
    REAL(name);                          \
    if (is_ours(descriptor)) FAIL(0);    \
    return real(descriptor);             \
  }
SYNC(fsync)
SYNC(fdatasync)

int rename(const char *from, const char *to) {
  REAL(rename);
  if (is_ours_at(AT_FDCWD, to)) FAIL(0);
  return real(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
  REAL(renameat);
  if (is_ours_at(to_folder, to)) FAIL(0);
  return real(from_folder, from, to_folder, to);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
  REAL(renameat2);
  if (is_ours_at(to_folder, to)) FAIL(0);
  return real(from_folder, from, to_folder, to, flags);
}

#define CHANGE(name, parameters, where, path, arguments) \
  int name parameters {                                  \
    REAL(name);                                          \
    if (is_ours_at(where, path)) change();               \
    return real arguments;                               \
  }
CHANGE(mkdir, (const char *path, mode_t bits), AT_FDCWD, path, (path, bits))
CHANGE(mkdirat, (int where, const char *path, mode_t bits), where, path, (where, path, bits))
CHANGE(rmdir, (const char *path), AT_FDCWD, path, (path))
CHANGE(unlink, (const char *path), AT_FDCWD, path, (path))
CHANGE(unlinkat, (int where, const char *path, int flags), where, path, (where, path, flags))
CHANGE(link, (const char *from, const char *path), AT_FDCWD, path, (from, path))
CHANGE(truncate, (const char *path, off_t size), AT_FDCWD, path, (path, size))

int ftruncate(int descriptor, off_t size) {
  REAL(ftruncate);
  if (is_ours(descriptor)) change();
  return real(descriptor, size);
}

int ftruncate64(int descriptor, off_t size) {
  REAL(ftruncate64);
  if (is_ours(descriptor)) change();
  return real(descriptor, size);
}
