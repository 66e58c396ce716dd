"""The man pages against the program, in both directions: options, keys, exit codes, environment variables."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from wanrt import __version__
from wanrt.cli import app
from wanrt.script.preset import Preset
from wanrt.script.schema import PromptFile, SceneTable, Transition

ROOT = Path(__file__).parents[2]
MAN = ROOT / "man"
ROOT_OPTIONS = {"--version", "--verbose", "-v", "--install-completion", "--show-completion"}
COMMON = {"--help", "-h", "--debug"}
COMMANDS = app.Commands()


def plain(roff: str) -> str:
    """One line of roff without its fonts and escapes."""
    text = re.sub(r"\\f[A-Z]", "", roff).replace("\\-", "-").replace("\\(dq", '"')
    return re.sub(r"^\.(B|BR|I|IR|RI|RB) ", "", text).replace('" "', " ").replace('"', "")


def tags(page: str, section: str | None = None) -> list[str]:
    """The tagged paragraphs' tags of a page, or of one of its sections."""
    lines = (MAN / page).read_text().splitlines()
    found, here = [], None
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith((".SH ", ".SS ")):
            here = line[4:]
        elif line == ".TP" and (section is None or here == section):
            found.append(plain(following))
    return found


def documented_options(page: str) -> set[str]:
    return {
        word
        for tag in tags(page)
        for word in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", tag)
        if tag.startswith("-")
    }


def leaves(command):
    """A command, or its subcommands."""
    subcommands = getattr(command, "commands", None)
    return list(subcommands.values()) if subcommands else [command]


def options(command) -> set[str]:
    return COMMON | {
        option for p in command.params for option in (*p.opts, *p.secondary_opts) if option.startswith("-")
    }


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_options_of_commands(name):
    real = set().union(*(options(leaf) for leaf in leaves(COMMANDS[name])))
    assert documented_options(f"wanrt-{name}.1") == real


def test_options_of_wanrt_itself():
    assert documented_options("wanrt.1") == COMMON | ROOT_OPTIONS == options(app.build())


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_placeholders_and_help(name):
    """A page names an option's value as --help does."""
    for leaf in leaves(COMMANDS[name]):
        for p in leaf.params:
            if p.param_type_name == "option" and p.metavar:
                (tag,) = {
                    tag for tag in tags(f"wanrt-{name}.1", "OPTIONS") if p.opts[0] in re.split(r"[ ,]+", tag)
                }
                assert tag.endswith(p.metavar), (tag, p.metavar)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_subcommands(name):
    text = (MAN / f"wanrt-{name}.1").read_text()
    for subcommand in getattr(COMMANDS[name], "commands", None) or {}:
        assert re.search(rf"wanrt {name} {subcommand}\b", text), subcommand


def test_every_command_has_a_page_and_every_page_a_command():
    pages = {page.name for page in MAN.iterdir()}
    assert pages == {"wanrt.1", "wanrt-prompt.5", *(f"wanrt-{name}.1" for name in COMMANDS)}
    listed = {tag.removesuffix(" (1)").removeprefix("wanrt-") for tag in tags("wanrt.1", "COMMANDS")}
    assert listed == set(COMMANDS)


def keys(section: str) -> set[str]:
    return {
        word for tag in tags("wanrt-prompt.5", section) for word in re.findall(r"[a-z_]+", tag.split("(")[0])
    }


def test_keys_of_prompt_files():
    assert keys("SETTINGS OF THE VIDEO") == set(PromptFile.model_fields)
    assert keys("SETTINGS OF A SCENE") == set(SceneTable.model_fields)
    assert keys("Keys of a transition") == set(Transition.model_fields)


def test_exit_codes():
    codes = {int(tag) for tag in tags("wanrt.1", "EXIT STATUS")}
    assert codes == {app.OK, app.FAILED, app.WRONG_USE, app.HUNG_UP, app.INTERRUPTED, app.TERMINATED}


def test_environment_variables():
    paths = [path for folder in ("wanrt", "kernels") for path in (ROOT / folder).rglob("*.py")]
    source = "\n".join(path.read_text() for path in paths)
    ours = set(re.findall(r'"(WANRT_[A-Z_]+)"', source))
    documented = set(tags("wanrt.1", "ENVIRONMENT"))
    assert {name for name in documented if name.startswith("WANRT_")} == ours
    for name in documented - ours - {"CUDA_VISIBLE_DEVICES"}:  # the driver reads that one
        assert f'"{name}"' in source, name


def test_the_version_is_the_packages():
    for page in MAN.iterdir():
        assert f'"wanrt {__version__}"' in page.read_text().splitlines()[0], page.name


def test_the_documented_example_is_the_demo_that_renders(tmp_path):
    from wanrt.script import build_job, read_script

    text = (MAN / "wanrt-prompt.5").read_text()
    example = text.split(".nf\n")[1].split(".fi\n")[0].replace("\\(dq", '"').replace("\\-", "-")
    file = tmp_path / "example.toml"
    file.write_text(example)
    job = build_job(read_script(str(file)))
    assert isinstance(job.preset, Preset)
    assert (job.frames, len(job.timeline.scenes)) == (80, 2)


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize("page", sorted(page.name for page in MAN.iterdir()))
def test_pages_render_without_warnings(page):
    ran = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-b", str(MAN / page)], capture_output=True, text=True, check=True
    )
    assert ran.stderr == ""
    assert ran.stdout.count("\n") > 15
    assert not [line for line in (MAN / page).read_text().splitlines() if line.endswith(" ")]
