"""From templates to HTML files that open from a disk or a mail, without a network and without scripts.

How a page looks is in templates/. Everything that a model, a recipe or a file name may hold is escaped by jinja2;
beyond that a page's content security policy lets no script run but the one that sorts tables, named by its hash, and
nothing be fetched from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import yaml
from markupsafe import Markup

from signbit.report import figures
from signbit.report.command import RECIPE_FILE
from signbit.report.heatmap import STEPS
from signbit.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **shown: Any) -> str:
    """The page that ``template`` makes of what is shown."""
    environment = _environment()
    script = _asset(environment, "sort.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        **shown,
        script=Markup(script),
        script_hash=digest,
        version=__version__,
        steps=STEPS,
        RECIPE_FILE=RECIPE_FILE,
    )


def chart_style() -> str:
    """What a chart needs of the page's style to stand for itself."""
    return _asset(_environment(), "chart.css")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # which takes a tenth of a second

    environment = Environment(
        loader=PackageLoader("signbit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "significant": figures.significant,
        "fixed": figures.fixed,
        "share": figures.percent,
        "bytes": figures.size,
        "folded": _folded,
        "yaml": lambda value: yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100),
    }
    return environment


def _folded(text: str) -> str:
    """A written text without the space around it, and with a mark for any run of lines that hold nothing."""
    return re.sub(r"\n(\s*\n){2,}", "\n⋮\n", text.strip())


def _asset(environment: Environment, name: str) -> str:
    """The text of a file beside the templates, as it is."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0].strip()
