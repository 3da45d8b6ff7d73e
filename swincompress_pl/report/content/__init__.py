"""What a report says, in whatever format."""

from typing import Any

from swincompress_pl._deprecated import find_old_name


def __getattr__(name: str) -> Any:
    return find_old_name("report.content", name)
