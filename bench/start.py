"""How long it takes to begin: `headway --help`, and what `import headway` adds to `import torch`. Whole processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

from common import interleave, save, spread

COMMAND = str(Path(sys.executable).with_name("headway"))
USE = "from headway import Mask, attend, load, train, compare"


def process(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    seconds = interleave(
        {
            "headway --help": lambda: process(COMMAND, "--help"),
            "import torch": lambda: process(sys.executable, "-c", "import torch"),
            "import torch, headway": lambda: process(sys.executable, "-c", "import torch, headway"),
            "import torch and every public name": lambda: process(sys.executable, "-c", f"import torch; {USE}"),
        },
        9,
    )
    median = {name: statistics.median(found) for name, found in seconds.items()}
    save(
        "start",
        {
            "seconds": {name: spread(found) for name, found in seconds.items()},
            "import_headway_adds": median["import torch, headway"] - median["import torch"],
            "every_public_name_adds": median["import torch and every public name"] - median["import torch"],
        },
    )
