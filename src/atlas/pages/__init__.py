"""HTML pages as Jinja templates, in this folder. A page is one file, fetches nothing, and escapes every value that it is given."""

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, **values: Any) -> str:
    """The page that `template` (`audit.html.jinja`, for example) makes of plain values. A value that is missing is an error."""
    return _environment().get_template(template).render(values)


@cache  # it keeps the compiled templates: to compile those of a run takes 0.08 s
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("atlas", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"counted": counted, "short": short, "thousands": "{:,}".format}
    return environment


def counted(count: int, noun: str) -> str:
    """`1 row`, `1,200 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def short(place: str) -> str:
    """A file, or a line of it, without its folders; a Hub id whole."""
    return place.rpartition("/")[2] if place.startswith("/") else place
