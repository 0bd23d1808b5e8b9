"""Keep the documentation complete without lists to maintain.

- A line `<!-- members: eqximplicit._condition ... -->` in `docs/api/` becomes the
  reference of every public name that those modules define, and `members: rest` of
  every public name that no other page shows.
- The guides in `docs/` and the examples are added to the navigation.
"""

import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PACKAGE = "eqximplicit"
PUBLIC_SUBPACKAGES = ("solvers", "linear_solvers", "nn")
MEMBERS = re.compile(r"<!-- members: (.*?) -->")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    guides = [p.name for p in sorted((ROOT / "docs").glob("*.md"))]
    guides = [{title(ROOT / "docs" / g): g} for g in guides if g != "index.md"]
    shown = [{title(p): f"examples/{p.name}"} for p in examples()]
    if shown:
        guides.append({"Examples": shown})
    config.nav[1:1] = guides
    return config


@event_priority(100)  # before mkdocs-jupyter, which takes over the files it knows
def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in examples():
        name = f"examples/{path.name}"
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    del page
    return MEMBERS.sub(lambda found: reference(found[1]), markdown)


def reference(where: str) -> str:
    """The mkdocstrings blocks of the public names defined in the modules `where`."""
    names = public_names()
    if where == "rest":
        names = {k: v for k, v in names.items() if not defined_in(v, shown_modules())}
    else:
        names = {k: v for k, v in names.items() if defined_in(v, where.split())}
    return "\n".join(f"::: {name}\n" for name in names)


def public_names() -> dict[str, str]:
    """From each public name to where it is defined, in order of definition."""
    package = griffe.load(PACKAGE, search_paths=[str(ROOT)])
    found: dict[str, str] = {}
    for place in (package, *(package[name] for name in PUBLIC_SUBPACKAGES)):
        for name, member in place.members.items():
            target = definition(member)
            if not name.startswith("_") and target and target not in found.values():
                found[f"{place.path}.{name}"] = target
    return found


def definition(member: griffe.Object | griffe.Alias) -> str | None:
    """Where a member is defined; `None` for a module and for other packages' names."""
    try:
        target = member.final_target if isinstance(member, griffe.Alias) else member
    except (griffe.AliasResolutionError, griffe.CyclicAliasError):
        return None
    ours = target.path.startswith(f"{PACKAGE}.")
    return target.path if ours and not target.is_module else None


def shown_modules() -> list[str]:
    """Every module that some page of the reference names."""
    pages = (p.read_text() for p in (ROOT / "docs" / "api").glob("*.md"))
    named = [where for text in pages for where in MEMBERS.findall(text)]
    return [module for where in named if where != "rest" for module in where.split()]


def defined_in(path: str, modules: list[str]) -> bool:
    return any(path.startswith(f"{module}.") for module in modules)


def examples() -> list[Path]:
    return sorted((ROOT / "examples").glob("[0-9]*.py"))


def title(path: Path) -> str:
    """The first heading of a page or of a percent script, else its file name."""
    heading = re.search(r"^(?:# )?# (.+)$", path.read_text(), re.MULTILINE)
    return heading[1] if heading else path.stem.replace("_", " ")
