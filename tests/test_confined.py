"""What watches the attacks sees what it is there for: a command that does each of the four things is caught."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

MISDEEDS = {
    "writes": ("open(elsewhere / 'owned', 'w').write('x')", "outside"),
    "renames": ("(elsewhere / 'a').rename(elsewhere / 'b')", "outside"),
    "links": ("os.symlink('/etc/hostname', elsewhere / 'link')", "outside"),
    "starts": ("import subprocess; subprocess.run(['true'])", "started"),
    "loads": ("import ctypes; ctypes.CDLL(str(elsewhere / 'a'))", "started"),
    "loops": ("while True: pass", "hung"),
    "sleeps": ("import time; time.sleep(1000)", "hung"),
    "escapes": ("print('\\x1b[2J')", "defect"),
    "raises": ("raise KeyError('x')", "defect"),
    "dies": ("os.abort()", "defect"),
    "allocates": ("bytearray(4 * 1024**3)", "defect"),
    "says nothing": ("raise SystemExit(2)", "defect"),
    "behaves": ("print('ok'); (root / 'out').write_text('x')", ""),
}
SCRIPT = """
import os, sys
from pathlib import Path
sys.path.append({tests!r})
import confined
import surgery.commands.app as app

root, elsewhere = Path({root!r}) / "ground", Path({root!r}) / "elsewhere"
for folder in (root, elsewhere):
    folder.mkdir()
(elsewhere / "a").write_text("a")

def main():
    {misdeed}

app.main = main
ran = confined.run([], root, root.with_name("scratch"), [root / "out"], confined.Limits(seconds=1, patience=4))
found = [name for name in ("outside", "started", "hung", "defect") if getattr(ran, name)]
print(found[0] if found else "")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux: memory is limited by address space")
@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_misdeed_is_seen(misdeed: str, tmp_path: Path) -> None:
    code, expected = MISDEEDS[misdeed]
    script = SCRIPT.format(tests=str(ROOT / "tests"), root=str(tmp_path), misdeed=code)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
