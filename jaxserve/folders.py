"""Folders that are the user's alone."""

import os
import stat
import sys
from pathlib import Path


def make_own(folder: Path) -> None:
    """Makes the folder if there is none. Raises OSError if it can't be one to which nobody else can write.

    What is loaded from it is trusted: programs are run, pages given to whoever asks. So nobody else may put another in
    its place either.
    """
    if sys.platform == "win32":
        raise PermissionError("on Windows it isn't known who can write to a folder")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found, around = folder.lstat(), folder.parent.stat()
    if found.st_uid != os.getuid():
        raise PermissionError("it is another user's; name a folder of yours")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others can write to it; take that right from them: chmod 700 {folder}")
    if around.st_mode & stat.S_IWOTH and not around.st_mode & stat.S_ISVTX:
        raise PermissionError(f"others can put another folder in its place; chmod o-w {folder.parent}")
