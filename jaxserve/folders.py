"""Folders that are the user's alone."""

import os
import stat
import sys
from pathlib import Path


def made_own(folder: Path) -> bool:
    """Makes the folder if there is none; whether nobody else can write to it, or put another in its place.

    What is loaded from it is trusted: programs are run, pages given to whoever asks.
    """
    if sys.platform == "win32":  # where rights aren't told by bits
        return False
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found, around = folder.lstat(), folder.parent.stat()
    except OSError:
        return False
    replaceable = around.st_mode & stat.S_IWOTH and not around.st_mode & stat.S_ISVTX
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not replaceable
