from __future__ import annotations

import json
import subprocess
import sys


def wanrt(*words):
    return subprocess.run([sys.executable, "-m", "wanrt", *words], capture_output=True, text=True, timeout=60)


def test_a_plan_for_another_machine_without_torch():
    code = (
        "import sys; from wanrt.cli import main; sys.argv = ['wanrt', 'plan', '--preset', 'krea-14b', '--devices', '5',"
        " '--gpu', 'H200', '--memory', '141', '--topology', 'pp1+tp=4', '--json']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [rank["name"] for rank in document["ranks"]] == ["stage0", "mesh0", "mesh1", "mesh2", "mesh3"]


def test_an_impossible_plan_is_one_line_and_exit_code_2():
    done = wanrt("plan", "--preset", "krea-14b", "--devices", "8", "--gpu", "H200", "--topology", "pp1+tp=5")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "13824 % 5 = 4 (ffn_dim)" in done.stderr
    assert done.stderr.count("\n") == 1
