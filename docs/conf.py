"""Settings of Sphinx; ``make docs`` builds the pages, and every warning is an error."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent

project = "maskmoe_kernels"
author = "The maskmoe_kernels authors"
project_copyright = author
with open(ROOT / "pyproject.toml", "rb") as file:
    version = release = tomllib.load(file)["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["README*"]
nitpicky = True

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"exclude-members": "__init__, __new__"}
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an attribute of a docstring is no object of its own
python_use_unqualified_type_names = True
strip_signature_backslash = True  # else Napoleon takes classes_ for a link called classes

html_theme = "furo"
html_title = f"maskmoe_kernels {release}"
html_static_path = ["static"]
html_css_files = ["page.css"]
html_copy_source = False
html_show_sphinx = False

#: Where the pages document what docstrings name by its last word, or by the module that defines it.
PUBLIC = (
    "maskmoe_kernels",
    "maskmoe_kernels.explain",
    "maskmoe_kernels.models",
    "maskmoe_kernels.nn",
    "maskmoe_kernels.ops.selection",
    "maskmoe_kernels.testing",
    "maskmoe_kernels.testing.strategies",
)

# Others' names; without a network there is no inventory to link them by.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|np|collections|typing|hypothesis|st|nn)(\..*)?"),
    ("py:.*", r"Tensor|Generator|Callable|Mapping|Sequence|Iterable|Iterator|Any|SearchStrategy"),
    (
        "py:.*",
        r"(.*\.)?(M|Width|NamedSubsets|Confidence|Encoder|Inner)",
    ),  # a type variable, names of types and of what is not public
]


def resolve(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Link a name of the package where the pages document it."""
    python = env.get_domain("py")
    target = node.get("reftarget", "")
    for parts in (2, 1):  # Class.method, name
        name = ".".join(target.split(".")[-parts:])
        for module in PUBLIC:
            if f"{module}.{name}" in python.objects:
                return python.resolve_xref(
                    env, node["refdoc"], app.builder, "obj", f"{module}.{name}", node, content
                )
    return None


#: Docstrings of properties as they are written, by name.
_written: dict[str, list[str]] = {}


def keep(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Before Napoleon, which takes what stands before a property's first colon for its type."""
    if what in ("property", "attribute"):
        _written[name] = [*lines]


def restore(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """After Napoleon."""
    lines[:] = _written.pop(name, lines)


def setup(app: Sphinx) -> None:
    """Connect what is above."""
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", keep, priority=400)
    app.connect("autodoc-process-docstring", restore, priority=600)
