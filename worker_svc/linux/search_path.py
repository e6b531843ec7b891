"""Where a program is looked for that is called by its name alone (execvp(3))."""

from __future__ import annotations

from typing import Final

PATH_FALLBACK: Final = "/usr/local/bin:/usr/bin:/bin"
_SEARCH_FOLDERS_MAX: Final = 1024


def search_folders(search: str) -> list[str]:
    """Where a program is looked for, each once, and so many at most: a PATH can be as long as any variable."""
    # An empty entry is the current directory, which is the job's.
    return [folder or "." for folder in dict.fromkeys(search.split(":"))][:_SEARCH_FOLDERS_MAX]
