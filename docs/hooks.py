"""The repository's pages as a site: what `mkdocs.yml` cannot say.

Every page is one file, which a repository browser shows as it is.  Links are those of the repository; this turns them
into those of the site, and brings along whatever a page links to outside of ``docs/``: other pages (README.md is the
first page), notebooks (as pages, with the outputs that they were committed with), tables, sources.  A link to a file
that is not there is left alone, so that ``mkdocs build --strict`` names it.
"""

import base64
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Where the pages at the root are on the site; those of docs/ are at its root.
PLACES = {
    "README.md": "index.md",
    "DESIGN.md": "design.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "LICENSE",
}
_FENCED = re.compile(r"(^[ ]*```.*?^[ ]*```[ ]*$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")


def place(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path in PLACES:
        return PLACES[path]
    inside = path.removeprefix("docs/")
    return inside.removesuffix(".ipynb") + ".md" if inside.endswith(".ipynb") else inside


def targets(markdown: str, path: str) -> Iterator[str]:
    """Files of the repository to which the page at ``path`` links."""
    for text in _FENCED.split(markdown)[::2]:
        for link in _LINK.findall(text):
            found = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
            if (ROOT / found).is_file():
                yield found


def relink(markdown: str, path: str) -> str:
    """The page at ``path`` with links of the site instead of the repository's."""
    here = posixpath.dirname(place(path)) or "."

    def link(match: re.Match[str]) -> str:
        found = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[0]))
        return posixpath.relpath(place(found), here) if (ROOT / found).is_file() else match[0]

    parts = _FENCED.split(markdown)
    parts[::2] = [_LINK.sub(link, text) for text in parts[::2]]
    return "".join(parts)


def read_page(path: str) -> tuple[str, dict[str, bytes]]:
    """A page of the repository as Markdown, and the pictures of a notebook by name.

    Args:
        path: of a Markdown file or a notebook, from the root.
    """
    text = (ROOT / path).read_text(encoding="utf-8")
    return (text, {}) if path.endswith(".md") else notebook_page(json.loads(text), Path(path).stem)


def notebook_page(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """Cells and outputs of a notebook as Markdown, and its pictures by name; ``stem`` begins their names."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            shown = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in shown:
                name = f"{stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(shown["image/png"]))
                parts.append(f"![what the cell above draws]({name})")
            elif "text/markdown" in shown:
                parts.append("".join(shown["text/markdown"]))
            else:
                parts.append(f"```text\n{''.join(shown['text/plain']).rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def on_files(files: Files, config: Any) -> Files:
    """Add the pages at the root, and whatever pages link to outside of docs/."""
    waiting = [*PLACES, *(f"docs/{file.src_uri}" for file in files if file.src_uri.endswith(".md"))]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if path.endswith((".md", ".ipynb")):
            text, pictures = read_page(path)
            found = set(targets(text, path)) - seen
            seen |= found
            waiting.extend(found)
            if not path.startswith("docs/"):
                files.append(File.generated(config, place(path), content=text))
            folder = posixpath.dirname(place(path))
            for name, content in pictures.items():
                files.append(File.generated(config, posixpath.join(folder, name), content=content))
        elif not path.startswith("docs/"):
            files.append(File.generated(config, place(path), content=(ROOT / path).read_bytes()))
    _SOURCES.clear()
    _SOURCES.update({place(path): path for path in seen})
    return files


_SOURCES: dict[str, str] = {}  # files of the repository by their place on the site


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of the site instead of the repository's."""
    return relink(markdown, _SOURCES[page.file.src_uri])
