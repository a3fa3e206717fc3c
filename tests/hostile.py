"""Names, texts and paths that do what they can to break out of a page, and a comparison that is made of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOSTILE_NAME = "<img src=x onerror=hacked=1>"
HOSTILE_TEXT = (
    "</blockquote></style><script>hacked=1</script>{{ 7*7 }} | `*_[a](javascript:hacked=1) \x00\x1b\u202e]]>&lt;"
)
HOSTILE_FOLDER = "<svg onload=hacked=1>'\" && *"


@dataclass(frozen=True)
class Compared:
    """What was compared, and what came out."""

    models: list[str]
    page: Path
    markdown: Path
    result: dict[str, Any]

    @property
    def html(self) -> str:
        return self.page.read_text(encoding="utf-8")
