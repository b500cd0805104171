"""Pages of the site that are made from the code, and links that work on GitHub and on the site alike.

- ``index.md`` is the README, ``changelog.md`` the CHANGELOG.
- ``methods/NAME.md``: a page for every start in ``src/lorainit/methods``, from its ``MethodInfo``, its docstrings, its
  options and its row in the reference suite's report. The source is read, not imported.
- The tables in ``methods/index.md`` are committed, for readers on GitHub: ``python docs/hooks.py`` writes them anew.
- A link to a file of the repository that is no page of the site leads to it on GitHub; a missing file is an error.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "benchmarks/results/reference/report.md"
OVERVIEW = ROOT / "docs/methods/index.md"
BEGIN, END = "<!-- written by docs/hooks.py -->", "<!-- until here -->"

NEEDS = {
    (): "nothing but the weights",
    ("weights",): "the weights from before quantization",
    ("forward",): "forward passes over calibration data; labels are not read",
    ("backward",): "forward and backward passes over labelled calibration data",
    ("forward", "backward"): "forward and backward passes over labelled calibration data",
    ("forward", "backward", "training"): "a short training on the data",
}
STEP_0 = {
    "zero": "unchanged: BA = 0",
    "preserve": "unchanged, exactly: BA ≠ 0 in the [offset form](../offset.md)",
    "step": "moves by s·BA, which is kept",
}
AT_HAND = {
    (): "No data are at hand, or none are to be read.",
    ("weights",): "The base is quantized, and its full weights are at hand.",
    ("forward",): "Batches of the task are at hand, with or without labels.",
    ("backward",): "Labelled batches of the task are at hand, and there is memory for gradients.",
    ("forward", "backward"): "Labelled batches of the task are at hand, and there is memory for gradients.",
    ("forward", "backward", "training"): "Some steps can be spent on the start before training begins.",
}
WHEN = {
    "zero": "The function stays, but A may be of another size than vanilla's, and want another learning rate: tune it, "
    "or ask `lorainit.suggest_lr`.",
    "preserve": "Tune the learning rate for it, or pass `match_lr=True`: with BA ≠ 0 the rate that suits vanilla LoRA "
    "is usually too high.",
    "step": "The function moves by s·BA before training begins: the report's |sBA|/|W| says how far. In few training "
    "steps this counts most.",
}


@dataclasses.dataclass(frozen=True)
class Start:
    """One start, as its source describes it."""

    cls: griffe.Class
    info: dict[str, Any]

    @property
    def page(self) -> str:
        """Its page, from the folder of the methods."""
        return f"{self.info['name']}.md"

    @property
    def module(self) -> griffe.Module:
        """The module that it is defined in."""
        return self.cls.module


def starts() -> list[Start]:
    """Read all starts: the cheap ones first, by what has to run before them and by name."""
    package = griffe.load("lorainit", search_paths=[str(ROOT / "src")], docstring_parser="google")
    defaults = {p.name: _literal(p.default) for p in package["methods.method.MethodInfo"].parameters if p.default}
    found = [
        Start(cls, defaults | _info(cls.members["info"]))
        for module in package["methods"].modules.values()
        for cls in module.classes.values()
        if not cls.is_alias and "info" in cls.members and "MethodInfo(" in str(cls.members["info"].value)
    ]
    if not found:
        raise PluginError("no start was found in src/lorainit/methods")
    return sorted(found, key=lambda start: (list(NEEDS).index(_needs(start)), start.info["name"]))


def _needs(start: Start) -> tuple[str, ...]:
    needs = tuple(start.info["needs"])
    if needs not in NEEDS:
        raise PluginError(f"{start.info['name']}: docs/hooks.py has no words for needs={needs}")
    return needs


def _literal(value: Any) -> Any:
    return ast.literal_eval(str(value))


def _info(attribute: griffe.Attribute) -> dict[str, Any]:
    [call] = [node for node in ast.walk(ast.parse(str(attribute.value))) if isinstance(node, ast.Call)]
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def options(start: Start) -> list[tuple[str, str, str]]:
    """List a start's options: name, default and description, those of its base classes too.

    Raises:
        PluginError: an option is described nowhere.
    """
    classes = [start.cls, *start.cls.mro()]
    described: dict[str, str] = {}
    for cls in reversed(classes):
        described |= _described(cls.docstring.value if cls.docstring else "")
    fields = {}
    for cls in reversed(classes):
        for name, member in cls.members.items():
            # a bare ClassVar keeps its annotation and its label, one with a type loses both
            field = member.is_attribute and "instance-attribute" in member.labels
            if field and member.annotation is not None and str(member.annotation) != "ClassVar":
                fields[name] = str(member.value) if member.value is not None else "(required)"
    if missing := sorted(set(fields) - set(described)):
        raise PluginError(f"{start.cls.path}: no docstring describes the options {missing}")
    return [(name, default, described[name]) for name, default in fields.items()]


def _described(docstring: str) -> dict[str, str]:
    """Read the entries below ``Args:`` of a Google docstring, also where more words stand before the colon."""
    entries: dict[str, str] = {}
    section = re.search(r"^(?:Args|Attributes)[^\n]*:\n((?: {4,}[^\n]*\n?|\n)*)", docstring, flags=re.MULTILINE)
    name = ""
    for line in section.group(1).splitlines() if section else []:
        if entry := re.match(r" {4}(\w+): (.*)", line):
            name = entry.group(1)
            entries[name] = entry.group(2)
        elif name:
            entries[name] += " " + line.strip()
    return entries


def evidence() -> dict[str, dict[str, str]]:
    """Read the headline table of the reference suite's report: a row for each start, by column."""
    table = re.search(r"^\| start \| tuned .*?(?=\n\n)", REPORT.read_text(), flags=re.MULTILINE | re.DOTALL)
    if table is None:
        raise PluginError(f"{REPORT} has no headline table")
    head, _, *rows = ([cell.strip() for cell in line.strip("| ").split("|")] for line in table.group(0).splitlines())
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def _sentence(text: str) -> str:
    """Begin with a capital letter, unless a formula comes first."""
    return text[0].upper() + text[1:] if text[:2].isalpha() else text


def _source(paper: str) -> str:
    """Return a reference with its arXiv number or DOI as a link."""
    paper = re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)
    return re.sub(r"doi:(\S+)", r"[doi:\1](https://doi.org/\1)", paper)


def _with_formulas(text: str) -> str:
    """Fence the indented blocks of a docstring, one formula a line."""

    def fenced(block: re.Match[str]) -> str:
        lines = "\n".join(re.sub(r"[,;] {3,}", "\n", line.strip()) for line in block.group(0).strip().splitlines())
        return f"```{{ .text .formula }}\n{lines.replace('`', '')}\n```\n"

    return re.sub(r"(?:^ {4}.*\n?)+", fenced, text, flags=re.MULTILINE)


def _cell(text: str) -> str:
    """Escape the bars of a table's cell; within backticks they are none."""
    pieces = text.replace("``", "`").split("`")
    return "`".join(piece if i % 2 else piece.replace("|", "\\|") for i, piece in enumerate(pieces))


def _page(start: Start, measured: dict[str, str] | None) -> str:
    info, module = start.info, start.module
    docstring = module.docstring.value if module.docstring else ""
    title, _, body = docstring.partition("\n\n")
    name, _, subtitle = title.rpartition(": ")
    rows = options(start)
    about = re.split(r"\n\n(?=Args|Attributes|Example)", start.cls.docstring.value if start.cls.docstring else "")[0]
    functions = [f for f in module.functions.values() if not f.is_alias and f.is_public and f.docstring]
    table = ["| option | default | |", "|---|---|---|"]
    table += [f"| `{name}` | `{_cell(default)}` | {_cell(text)} |" for name, default, text in rows]
    path = module.filepath.relative_to(ROOT).as_posix()
    extras = [
        'Layers can compete for ranks (`ranks="budget"`).' if info["variable_ranks"] else "",
        "The seed has no influence." if info["deterministic"] else "",
    ]
    call = f'lorainit.initialize(model, "{info["name"]}"{", data=loader" if set(_needs(start)) - {"weights"} else ""})'
    names = ", ".join(f"`{name}`" for name in (info["name"], *info["aliases"]))
    parts = [
        f"# {re.sub(r' start| [(]reconstruction[)]', '', name) or start.cls.name}",
        _sentence(subtitle),
        about,
        *(
            [
                '!!! warning "A reconstruction"\n\n    The publication leaves the formula open: results with this '
                "start are not the paper's."
            ]
            if info["status"] == "reconstruction"
            else []
        ),
        f"```python\n{call}   # or lorainit.{start.cls.name}(...)\n```",
        f"| names | {names} |\n|---|---|\n"
        f"| needs | {NEEDS[_needs(start)]} |\n"
        f"| the function at step 0 | {STEP_0[info['product']]} |\n"
        f"| source | {_source(info['paper'])} |\n"
        f"| code | [`{path}`](../../{path}) |",
        f"## Formula\n\n{_sentence(info['summary'])}.",
        _with_formulas(body),
        "## Options",
        "\n".join(table) if rows else "It has none.",
        "## Cost and evidence",
        _measured(info["name"], measured),
        "## When",
        " ".join([AT_HAND[_needs(start)], WHEN[info["product"]], *filter(None, extras)])
        if info["name"] != "kaiming"
        else "First. It is what every other start has to beat at its own best learning rate.",
        "## The mathematics, as functions of tensors" if functions else "",
        *(f"::: {function.path}\n    options: {{heading_level: 3}}" for function in functions),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _measured(name: str, row: dict[str, str] | None) -> str:
    if row is None:
        return "It is not in the [reference suite](../results.md)."
    cost = f"A start took {row['start takes']} on average over the tasks of the [reference suite](../results.md)."
    if row["tuned"] == "–":
        return f"{cost} It is what the others are compared with there."
    columns = ("tuned", "at vanilla's rate", "at suggested rate", "match_lr", "better / worse")
    return (
        f"{cost} Its change of the evaluation loss beside tuned vanilla LoRA's there (negative is better):\n\n"
        f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n| {' | '.join(row[column] for column in columns)} |"
    )


def _overview(found: list[Start], page: Callable[[Start], str]) -> str:
    """Return a table of the starts for each of what they need, their names as links to ``page``."""
    parts = []
    for needs in dict.fromkeys(map(_needs, found)):
        rows = [
            f"| [`{s.info['name']}`]({page(s)}) | {_cell(s.info['summary'])}"
            f"{' (a **reconstruction**)' if s.info['status'] == 'reconstruction' else ''} "
            f"| {STEP_0[s.info['product']].split(':')[0].split(',')[0]} | {_source(s.info['paper'])} |"
            for s in found
            if _needs(s) == needs
        ]
        lines = [
            f"## {_sentence(NEEDS[needs])}\n",
            "| name | start | the function at step 0 | source |",
            "|---|---|---|---|",
            *rows,
        ]
        parts.append("\n".join(lines))
    return f"{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}"


def _with_overview(markdown: str, overview: str) -> str:
    """Replace what stands between the two marks."""
    before, rest = markdown.split(BEGIN)
    return before + overview + rest.split(END)[1]


def committed_overview(found: list[Start]) -> str:
    """Return the tables as they are read on GitHub, where the names lead to the source."""
    return _overview(found, lambda start: f"../../{start.module.filepath.relative_to(ROOT).as_posix()}")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the methods into the navigation."""
    config.extra["starts"] = found = starts()
    if committed_overview(found) not in OVERVIEW.read_text():
        raise PluginError(f"{OVERVIEW.relative_to(ROOT)} is out of date: run .venv-docs/bin/python docs/hooks.py")
    [methods] = [entry["Methods"] for entry in config.nav or [] if "Methods" in entry]
    methods += [{start.info["name"]: f"methods/{start.page}"} for start in found]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    rows = evidence()
    pages = {"index.md": (ROOT / "README.md").read_text(), "changelog.md": (ROOT / "CHANGELOG.md").read_text()}
    for start in config.extra["starts"]:
        pages[f"methods/{start.page}"] = _page(start, rows.get(start.info["name"]))
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the table of the starts lead to their pages, and each link to where it can be followed."""
    if page.file.src_uri == "methods/index.md":
        markdown = _with_overview(markdown, _overview(config.extra["starts"], lambda start: start.page))
    # README and CHANGELOG lie at the root of the repository, the other pages below docs/
    at_root = page.file.src_uri in ("index.md", "changelog.md")
    folder = ROOT if at_root else ROOT / "docs" / Path(page.file.src_uri).parent
    blob = f"{config.repo_url}/blob/main/"

    def lead(link: re.Match[str]) -> str:
        target, anchor = link.group(1), link.group(2) or ""
        target = target.removeprefix(blob) if (absolute := target.startswith(blob)) else target
        if "://" in target or target.startswith(("#", "mailto:")):
            return link.group(0)
        path = Path(os.path.normpath((ROOT if absolute else folder) / target))
        source = path.relative_to(ROOT / "docs").as_posix() if path.is_relative_to(ROOT / "docs") else ""
        if path == ROOT / "CHANGELOG.md":
            source = "changelog.md"
        if source in files.src_uris:
            return f"]({os.path.relpath(source, Path(page.file.src_uri).parent)}{anchor})"
        if not path.exists():
            raise PluginError(f"{page.file.src_uri}: there is no {target}")
        kind = "tree" if path.is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{path.relative_to(ROOT).as_posix()}{anchor})"

    markdown = re.sub(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", lead, markdown)
    # in tables a number stays beside its deviation and its unit
    return re.sub(
        r"^\|.*",
        lambda row: re.sub(r" (?=[±%])|(?<=±) |(?<=\d) (?=m?s )", "\N{NO-BREAK SPACE}", row.group(0)),
        markdown,
        flags=re.M,
    )


if __name__ == "__main__":
    OVERVIEW.write_text(_with_overview(OVERVIEW.read_text(), committed_overview(starts())))
