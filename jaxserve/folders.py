"""Folders that are the user's alone."""

import os
import stat
import sys
from pathlib import Path


def make_own(folder: Path, mark: str | None = None) -> None:
    """Makes the folder if there is none. Raises OSError if it can't be one to which nobody else can write.

    What is loaded from it is trusted: programs are run, pages given to whoever asks. So nobody else may put another in
    its place either. With a `mark`, the name of something in it, it must be there already, or the folder be empty:
    whoever names a folder of other things by mistake keeps it as it is.
    """
    if sys.platform == "win32":
        raise PermissionError("on Windows it isn't known who can write to a folder")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError("it is a file, not a folder")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found, around = folder.lstat(), folder.parent.stat()
    if found.st_uid != os.getuid():
        raise PermissionError("it is another user's; name a folder of yours")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others can write to it; take that right from them: chmod 700 {folder}")
    if around.st_mode & stat.S_IWOTH and not around.st_mode & stat.S_ISVTX:
        raise PermissionError(f"others can put another folder in its place; chmod o-w {folder.parent}")
    if mark and any(folder.iterdir()) and not (folder / mark).exists():  # in this order: others may make it just now
        raise FileExistsError("it has other things in it; name an empty folder, or a new one")
