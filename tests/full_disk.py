"""A disk that is full, for a while and for anybody: files may not grow further.

The limit of a process's files takes no privileges, and is met in `write` as the end of
a disk is. Small files still fit, as they often do on a full disk.
"""

import contextlib
import resource


def limit(num_bytes):
    """Lets this process write no file beyond so many bytes."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, most))


@contextlib.contextmanager
def beyond(num_bytes):
    """Limits the files of this process inside."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit(num_bytes)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
