"""Files that strangers made, against every command: what they may cost, and what they may do.

What damages files and runs commands is the tests' own, in tests/.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests"))
