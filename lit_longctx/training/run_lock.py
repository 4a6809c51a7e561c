"""One run per folder: a lock that the first process holds as long as it lives."""

import fcntl
import os
import socket
from datetime import datetime
from pathlib import Path

NAME = ".lock"


class RunLock:
    """Lock of a run folder, which ends with the process however it ends.

    A POSIX record lock (`fcntl`): not inherited by loader workers, and kept by the file server on
    NFS (version 4, or 3 with lockd), so that it holds between machines. A server that has not yet
    noticed that a machine is gone refuses; who held it stands in the file and in the error.

    Raises:
        ValueError: Another process holds it.
    """

    def __init__(self, run: Path) -> None:
        run.mkdir(parents=True, exist_ok=True)
        path = run / NAME
        self.file = path.open("a+")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.file.seek(0)
            holder = self.file.read().strip() or "an unknown process"
            self.file.close()
            raise ValueError(
                f"{run} is in use by {holder} ({error.strerror}); wait for it, choose another "
                f"--trainer.default_root_dir, or, if that machine is gone, remove {path}"
            ) from None
        self.file.truncate(0)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        self.file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        self.file.flush()

    def release(self) -> None:
        """Let another run have the folder."""
        self.file.close()
