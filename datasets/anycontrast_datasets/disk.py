"""Write files so that a full disk ends in one clear error and leaves nothing half written."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anycontrast_datasets.files import write_durably
from anycontrast_datasets.study import ShardError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""No space, no quota, or a limit on the size of a file."""


@contextmanager
def full_disk_named(path: Path, num_bytes: int) -> Iterator[None]:
    """Turn "no space left" into an error that says where, how much is needed and what is free.

    Args:
        path: File that is being written.
        num_bytes: What the step inside is about to write.

    Raises:
        ShardError: Code `disk_full`. Any other error passes as it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(path.parent).free
        raise ShardError(
            f"writing {path}: needs {num_bytes} more bytes, found {free} free ({error.strerror}); "
            "make room or raise the quota, then run it again: what is finished is kept",
            code="disk_full",
        ) from error


def write_checked(path: Path, content: bytes) -> None:
    """Write a file whole and durably, or not at all, with a clear error on a full disk."""
    with full_disk_named(path, len(content)):
        write_durably(path, content)
