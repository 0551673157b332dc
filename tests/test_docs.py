"""What README.md and docs/ name is there: links, files, commands, names."""

import importlib
import re

import jax.numpy as jnp
import pytest

import qlora_jax as ql
from qlora_jax.cli.main import COMMANDS, main
from tests.conftest import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
# Where the files lie that a page names without their folder.
FOLDERS = ("", "qlora_jax", "pallas_kernels")


def anchors(text: str) -> set[str]:
    """The names by which the headings of a page are linked to."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading).lower() for heading in headings]
    return {name.replace(" ", "-") for name in words}


def commands(text: str) -> list[str]:
    """The command lines of a page, each with the lines it goes on in."""
    text = text.replace("\\\n", " ")
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    blocks = re.findall(r"```\n(.*?)```", text, re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.split("\n")]
    return [line for line in [*spans, *lines] if line.startswith("qlora-jax ")]


@pytest.fixture(scope="module")
def flags():
    """Command -> its flags, as its help names them."""
    return {}


def flags_of(command, flags, capsys):
    if command not in flags:
        with pytest.raises(SystemExit) as end:
            main([*command.split(), "--help"])
        assert not end.value.code
        flags[command] = {*re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out)}
    return flags[command]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page):
    for name in re.findall(r"`([\w/]+\.py)`", PAGES[page]):
        assert any((ROOT / folder / name).is_file() for folder in FOLDERS), name
    for module in re.findall(r"python -m ([\w.]+)", PAGES[page]):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_flags_they_are_given(page, flags, capsys):
    for line in commands(PAGES[page]):
        name = line.split()[1]
        assert name in COMMANDS or name == "COMMAND", line
        if name in COMMANDS:
            command = "data show" if name == "data" else name
            given = {*re.findall(r"(?<=\s)--[a-z][a-z0-9-]*", line)} - {"--help"}
            assert given <= flags_of(command, flags, capsys), line


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_are_named_are_there(page, flags, capsys):
    every = {"--help"}
    for command in COMMANDS:
        command = "data show" if command == "data" else command
        every |= flags_of(command, flags, capsys)
    for program in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")]:
        source = program.read_text(encoding="utf-8")
        every |= {*re.findall(r'"(--[a-z][a-z0-9-]*)"', source)}
    for span in re.findall(r"`(--[^`\n]+)`", PAGES[page]):
        assert {*re.findall(r"--[a-z][a-z0-9-]*", span)} <= every, span


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_library_are_there(page):
    for name in re.findall(r"\bql\.([a-zA-Z_][\w.]*\w)", PAGES[page]):
        found = ql
        for part in name.split("."):
            found = getattr(found, part)
    for name in re.findall(r"\bqlora_jax\.([a-z_]+(?:\.\w+)*)", PAGES[page]):
        module, found = "qlora_jax", None
        for part in name.split("."):
            found = getattr(found, part, None)
            if found is None:
                module += f".{part}"
                found = importlib.import_module(module)


def test_the_test_finds_what_is_not_there(flags, capsys):
    assert anchors("# A page\n## What `it` is, and why\n") == {
        "a-page",
        "what-it-is-and-why",
    }
    page = "`qlora-jax plan --model M`\n```\n$ qlora-jax eval --text a \\\n  --x 1\n```"
    assert commands(page) == [
        "qlora-jax plan --model M",
        "qlora-jax eval --text a    --x 1",
    ]
    assert "--text" in flags_of("eval", flags, capsys)
    assert "--x" not in flags_of("eval", flags, capsys)


def test_optimizers_of_the_page_take_a_step():
    (source,) = re.findall(
        r"```python\n(.*?)```", PAGES["docs/optimizers.md"], re.DOTALL
    )
    names: dict = {}
    exec(compile(source, "optimizers.md", "exec"), names)
    assert source.count("tx = ") == 3
    for line in source.split("\ntx = ")[1:]:
        tx = eval(line.split("  #")[0], names)
        params = {"w": jnp.zeros(300, jnp.bfloat16)}
        grads = {"w": jnp.ones(300, jnp.bfloat16)}
        updates, _ = tx.update(grads, tx.init(params), params)
        assert jnp.all(updates["w"] < 0)
