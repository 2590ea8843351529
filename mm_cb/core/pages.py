"""Report pages as files: what mm-cb wrote it may write again or remove, and nothing else."""

from pathlib import Path

from mm_cb.core.errors import UserError
from mm_cb.core.files import file_errors

PAGE = "report.html"
"""A run's own page, in its folder."""
TITLE = "Circuit breaker report"


def not_ours(page: Path, title: str = TITLE) -> str | None:
    """What stands at a page's place that mm-cb did not put there, in words; None for its page, or nothing at all.

    Args:
        page: The place.
        title: What mm-cb's page there is called.
    """
    if page.is_symlink():
        return f"a link to `{page.readlink()}`"
    if page.is_dir():
        return "a directory"
    if not page.exists():
        return None
    if not page.is_file():
        return "no plain file"
    with file_errors(page), page.open("rb") as opened:
        made_here = f"<title>{title}</title>".encode() in opened.read(2000)
    return None if made_here else "no report page"


def refuse_other_page(page: Path, title: str = TITLE) -> None:
    """Refuse a place for a command's own page, before its work, where something else stands.

    Raises:
        UserError: Saying what does.
    """
    if strange := not_ours(page, title):
        raise UserError(f"`{page}` is {strange} and is left alone; move it, or give another `--out`.")
