"""The command from outside: exit codes, one-line errors, nothing heavy imported before it is needed."""

import json
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from wanrt.cli import app
from wanrt.errors import OutputError, ScriptError

HEAVY = (
    "torch",
    "av",
    "rich",
    "numpy",
    "pydantic",
    "imageio_ffmpeg",
    "tokenizers",
    "huggingface_hub",
    "platformdirs",
)


def wanrt(*arguments, stdin=None, env=None):
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "wanrt", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
    )


def processor_seconds(script):
    """What running `script` costs: (processor seconds, the least of three runs; its last line on stderr)."""

    def once():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
        return spent, ran.stderr.splitlines()[-1:]

    return min(once() for _ in range(3))


def test_help_is_quick_and_imports_nothing_heavy():
    script = (
        "import sys, json\nfrom wanrt.cli.app import run\ntry: run(['--help'])\nexcept SystemExit as e: code = e.code\n"
        "print(json.dumps([code, sorted({name.split('.')[0] for name in sys.modules})]), file=sys.stderr)"
    )
    spent, (line,) = processor_seconds(script)
    code, modules = json.loads(line)
    assert code == 0
    assert not set(HEAVY) & set(modules)
    torch_alone, _ = processor_seconds("import torch")
    assert spent < torch_alone / 3


@pytest.mark.parametrize("name", sorted(app.Commands()))
def test_help_of_every_command_imports_nothing_heavy(name):
    script = (
        f"import sys\nfrom wanrt.cli.app import run\ntry: run([{name!r}, '--help'])\nexcept SystemExit: pass\n"
        f"sys.exit(sorted(set({HEAVY!r}) & set(sys.modules) - {{'pydantic'}}) or 0)"  # Typer itself reads types with it
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "Usage: wanrt " + name in ran.stdout


def test_version():
    from wanrt import __version__

    ran = wanrt("--version")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"wanrt {__version__}\n", "")


def test_no_arguments_show_help():
    ran = wanrt()
    assert ran.returncode == 2
    assert "Usage: wanrt" in ran.stderr
    assert "render" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rendr"], "Did you mean 'render'?"),
        (["render", "x", "--sed", "3"], "--seed"),
        (["render", "x", "y"], "a prompt of several words goes in quotes"),
        (["render", "--seed", "x", "a ball"], '--seed: got "x"'),
        (["render", ""], "empty prompt"),
        (["render", "nothing.toml"], '"nothing.toml" does not exist'),
        (["render", "a ball", "--quiet", "--plain"], "choose one"),
        (["render", "a ball", "--topology", "tp=x"], "--topology"),
        (["presets", "nothing"], "is unknown"),
        (["render", "a ball", "--seed"], "--seed"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments, says):
    ran = wanrt(*arguments)
    assert ran.returncode == 2
    assert says in ran.stderr
    (line,) = ran.stderr.splitlines()
    assert line.startswith("wanrt: ")
    assert ran.stdout == ""


def test_a_wrong_file_lists_every_finding():
    ran = wanrt("render", "-", "--size", "3x3", stdin='seed = -1\n[[scene]]\nprompt = ""\n')
    assert ran.returncode == 2
    lines = ran.stderr.splitlines()
    assert [line[:18] for line in lines] == ["wanrt: --size: got", "wanrt: <stdin>:1: ", "wanrt: <stdin>:3: "]


def test_binary_garbage(tmp_path):
    file = tmp_path / "garbage.toml"
    file.write_bytes(bytes(range(256)) * 40)
    ran = wanrt("render", str(file))
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"wanrt: {file}:1: not TOML") or "UTF-8" in line


def test_presets():
    assert "krea-14b" in wanrt("presets").stdout
    assert "40 layers" in wanrt("presets", "krea-14b").stdout
    assert json.loads(wanrt("presets", "krea-14b", "--json").stdout)["name"] == "krea-14b"


def test_a_closed_pipe_is_no_error():
    ran = subprocess.run(
        f"{sys.executable} -m wanrt presets | true; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True,
    )  # fmt: skip
    assert "Traceback" not in ran.stderr
    assert ran.returncode in (0, 1, 141)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream_is_like_the_null_device(closed):
    command = f"exec {sys.executable} -m wanrt render - -o x.mp4 {closed}"
    done = subprocess.run(
        ["sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "internal" not in done.stderr
    assert ("scene is missing" in done.stderr) == (closed != "2>&-")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell):
    ran = wanrt(env={"_WANRT_COMPLETE": f"source_{shell}"})
    assert ran.returncode == 0
    assert "wanrt" in ran.stdout
    words = {"_WANRT_COMPLETE": "complete_bash", "COMP_WORDS": "wanrt pre", "COMP_CWORD": "1"}
    assert "presets" in wanrt(env=words).stdout
    words |= {"COMP_WORDS": "wanrt render x --preset kr", "COMP_CWORD": "4"}
    assert "krea-14b" in wanrt(env=words).stdout


def failing(monkeypatch, error, *arguments):
    """Exit code of a command that raises `error`."""

    def command() -> None:
        """Fail."""
        raise error

    monkeypatch.setitem(sys.modules, "wanrt.cli.presets", SimpleNamespace(command=command))
    with pytest.raises(SystemExit) as caught:
        app.run([*arguments, "presets"])
    return caught.value.code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ScriptError("f:1: a\nf:2: b"), 2, "wanrt: f:1: a\nwanrt: f:2: b\n"),
        (OutputError("no space"), 1, "wanrt: no space\n"),
        (KeyboardInterrupt(), 130, "wanrt: interrupted\n"),
        (ValueError("a\nb"), 1, "wanrt: internal error: ValueError: a b (--debug shows where)\n"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, line):
    assert failing(monkeypatch, error) == code
    assert capsys.readouterr().err == line


def test_debug_shows_the_traceback(monkeypatch, capsys):
    assert failing(monkeypatch, ValueError("a"), "--debug") == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_command_is_one_file():
    """Every module of wanrt/cli that is no helper defines `command`, and its help says what it does."""
    commands = app.Commands()
    assert {"render", "presets"} <= set(commands)
    for name, command in commands.items():
        assert command.help, name
        assert "--debug" in {option for p in command.params for option in p.opts}, name
