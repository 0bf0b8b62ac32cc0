"""Every block of README and the site runs as it is printed, and every public name and page is reachable."""

from __future__ import annotations

import ast
import configparser
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import freezehooks
from freezehooks import layers
from freezehooks._rules.spec import rules_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)

NEEDS = {
    "lightning": r"\blightning\b",
    "transformers": r"\btransformers\b",
    "accelerate": r"\baccelerate\b",
    "matplotlib": r"\.plot\(|\bplot_training\(",
    "peft": r"\bpeft\b",
    "safetensors": r"\bsafetensors\b",
    "ignite": r"\bignite\b",
    "skorch": r"\bskorch\b",
    "fastai": r"\bfastai\b",
    "keras": r"\bkeras\b",
    "opacus": r"\bopacus\b",
    "bitsandbytes": r"\badamw_bnb_",
    "torchao": r"\btorchao\b",
    "trl": r"\btrl\b",
    "sentence_transformers": r"\bsentence_transformers\b",
    "yaml": r"\.yaml\b|\byaml\b",
}
"""Text by which to recognize that a block needs an optional package."""


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int

    @property
    def lacks(self) -> str:
        """The package that the block needs and that is missing, or nothing."""
        for package, sign in NEEDS.items():
            if re.search(sign, self.text) and importlib.util.find_spec(package) is None:
                return package
        computes_in_shards = hasattr(torch.cpu.Stream, "record_event")  # see tests/parallel.py
        return "" if computes_in_shards or "fully_shard" not in self.text else "a torch whose FSDP2 runs on a CPU"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [Block(m[1] or "bash", m[2], text.count("\n", 0, m.start()) + 2) for m in FENCE.finditer(text)]


@pytest.fixture
def _clean_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in a separate folder, and clean up the process group."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated")  # Lightning's own
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")  # TRL's own
@pytest.mark.filterwarnings("ignore:`torch.jit.\\w+` is deprecated")  # Ignite's own
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # and so writes one process's checkpoint
@pytest.mark.usefixtures("_clean_up")
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_blocks_of_a_page_run_and_print_what_it_shows(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing, printed = set[str](), ""
    for block in blocks_of(page):
        where = f"{page.name}:{block.line}"
        if block.lacks or (missing and block.language == "console"):  # its files may be those of a block left out
            missing |= {block.lacks} - {""}
            printed = ""
        elif block.language == "python":
            printed = run_python(block, where, monkeypatch)
        elif block.language == "console":
            check_console(block, where)
        elif block.language == "yaml":
            check_yaml(block, where)
        elif block.language == "text" and printed:
            assert matches(printed, block.text), f"{where}: printed was\n{printed}"
            printed = ""
    if missing:
        pytest.skip(f"the other blocks ran: some need {', '.join(sorted(missing))}")


def run_python(block: Block, where: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a block in a module of its own, with the page's line numbers, and return what it printed."""
    module = ModuleType("block")  # a module, as classes in it must pickle
    monkeypatch.setitem(sys.modules, "block", module)
    code = compile("\n" * (block.line - 1) + block.text, where, "exec")
    # not capsys: the log handlers of frameworks that are imported here would keep its stderr
    with redirect_stdout(StringIO()) as printed:
        exec(code, vars(module))
    return printed.getvalue()


def check_console(block: Block, where: str) -> None:
    """Run each `$ freezehooks ...` of a block, and compare its output with what is printed below it."""
    from freezehooks.cli import main

    begin, *commands = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert not begin.strip(), f"{where}: a console block begins with `$ `"
    assert commands
    for command in commands:
        line, _, shown = command.partition("\n")
        program, *arguments = shlex.split(line, comments=True)
        assert program == "freezehooks", f"{where}: `{program}` belongs into a bash block"
        with redirect_stdout(StringIO()) as printed, redirect_stderr(printed), suppress(SystemExit):
            main(arguments)  # argparse exits by itself after --help and --version
        assert matches(printed.getvalue(), shown), f"{where}: `{line}` printed\n{printed.getvalue()}"


def matches(printed: str, shown: str) -> bool:
    """Return whether the text is what the page shows, where a line `...` stands for any lines."""
    lines = [r"(?:.*\n)*?" if line == "..." else re.escape(line) + "\n" for line in stripped(shown)]
    return re.fullmatch("".join(lines), "".join(f"{line}\n" for line in stripped(printed))) is not None


@pytest.mark.parametrize("shown", ["one\ntwo\nthree", "one\n...\nthree", "...", "...\nthree", "one\n...\ntwo\nthree"])
def test_a_line_of_dots_stands_for_any_lines(shown: str) -> None:
    assert matches("one\ntwo  \nthree\n\n", f"{shown}\n")


@pytest.mark.parametrize("shown", ["", "one\nthree", "one\n...\ntwo", "...\ntwo", "one\ntwo\nthree\nfour", "o..\n..."])
def test_what_was_not_printed_is_not_taken_for_it(shown: str) -> None:
    assert not matches("one\ntwo\nthree\n", shown)


def stripped(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip("\n").splitlines()]


def check_yaml(block: Block, where: str) -> None:
    """Read the rules of a block; `# name.yaml` on its first line puts it into the page's folder."""
    yaml = pytest.importorskip("yaml")
    rules = [rules_of(spec) for spec in specs_in(yaml.safe_load(block.text))]
    assert any(rules), f"{where}: no rules in it"
    name = re.match(r"# (\S+\.yaml)\n", block.text)
    if name is not None:
        Path(name[1]).write_text(block.text)


def specs_in(content: Any) -> Iterator[Any]:
    """Yield the specs of a configuration for LightningCLI, or the one of a file of rules."""
    if not isinstance(content, Mapping) or not {"trainer", "rules", "spec"} & set(content):
        yield content
        return
    for key in ("rules", "spec"):
        if key in content:
            yield content[key]
    for callback in content.get("trainer", {}).get("callbacks", []):
        yield callback["init_args"]["spec"]


BLOCKS = [(f"{name}:{block.line}", block) for page, name in zip(PAGES, NAMES, strict=True) for block in blocks_of(page)]


def is_checked(name: str, language: str) -> bool:
    """Return whether a block is of a kind that is run or compared; a directive of the site is text."""
    if name.startswith("docs/errors.md:") and language == "pycon":
        return True  # by tests/test_rules_page.py
    return language in {"python", "console", "bash", "yaml", "text"} or language.startswith("{")


def test_blocks_are_of_kinds_that_are_checked() -> None:
    assert [name for name, block in BLOCKS if not is_checked(name, block.language)] == []


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_fence_is_missed(page: Path) -> None:
    assert len(re.findall(r"^\s*(?:```|~~~|:::)", page.read_text(), re.MULTILINE)) == 2 * len(blocks_of(page))


def commands() -> Iterator[tuple[str, str]]:
    for name, block in BLOCKS:
        if block.language == "bash":
            lines = [line.partition("#")[0].removeprefix("$ ").strip() for line in block.text.splitlines()]
            yield from ((f"{name}: {line}", line) for line in lines if line)


@pytest.mark.parametrize("command", [command for _, command in commands()], ids=[name for name, _ in commands()])
def test_commands_are_those_that_others_check(command: str) -> None:
    """Targets of the Makefile, which it has; files of examples, which tests/test_examples.py runs; known extras."""
    program, *arguments = shlex.split(command)
    program = program.removeprefix(".venv/bin/")  # what the Makefile makes
    if program == "make":
        targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert set(arguments) <= targets
    elif program == "pip":
        assert is_known_install(arguments)
    elif program in ("torchrun", "python"):
        scripts = [argument for argument in arguments if argument.endswith(".py")]
        assert scripts or arguments[:2] == ["-m", "benchmarks"]
        assert all(script.startswith("examples/") and (ROOT / script).is_file() for script in scripts)
    else:
        pytest.fail(f"`{program}` is checked by nobody")


def is_known_install(arguments: list[str]) -> bool:
    """Return whether pip is asked for this checkout (nothing is published yet), with extras that setup.cfg has."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    asked = re.fullmatch(r"install (?:-e )?\.(?:\[([\w,]+)\])?", " ".join(arguments))
    return asked is not None and set((asked[1] or "").split(",")) - {""} <= set(setup["options.extras_require"])


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_no_page_asks_for_a_package_that_is_not_published(page: Path) -> None:
    assert not re.search(r"pip install [\"']?freezehooks", page.read_text())


def public_names() -> list[str]:
    names = [f"freezehooks.{name}" for name in freezehooks.__all__]
    names += [f"freezehooks.layers.{name}" for name in layers.__all__]
    integrations = Path(freezehooks.__file__).parent / "integrations"
    for framework in sorted(integrations.glob("[!_]*.py")):  # read, as what they import may be missing
        for node in ast.parse(framework.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                names.append(f"freezehooks.integrations.{framework.stem}.{node.name}")
    return names


@pytest.mark.parametrize("name", public_names())
def test_a_public_name_is_on_one_page_of_the_api(name: str) -> None:
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    assert len(re.findall(rf"^\.\. auto\w+:: {re.escape(name)}(?:\(.*\))?$", text, re.MULTILINE)) == 1


def test_every_page_is_reached_from_the_first() -> None:
    seen: set[Path] = set()
    ahead = [DOCS / "index.md"]
    while ahead:
        page = ahead.pop()
        seen.add(page)
        for tree in (block for block in blocks_of(page) if block.language == "{toctree}"):
            entries = [line for line in tree.text.splitlines() if line and not line.startswith(":")]
            ahead += [page.parent / f"{re.sub(r'.*<|>', '', entry)}.md" for entry in entries]
    assert {page.resolve() for page in seen} == {page.resolve() for page in PAGES[1:]}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if target and not (page.parent / target).is_file()] == []
    if page.is_relative_to(DOCS):  # what lies outside is not on the site
        outside = [target for target in targets if not (page.parent / target).resolve().is_relative_to(DOCS)]
        assert outside == []
