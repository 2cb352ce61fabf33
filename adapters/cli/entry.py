"""Entry point of the command. An installation has this file outside `adapters`, as the module `_fluxion_command`.

So it can say what is wrong also where `adapters` cannot be imported, because another distribution has overwritten the
files of this package.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the command `fluxion`."""
    try:
        from adapters.cli import main as command
    except Exception:
        damage = Path(__file__).parent / "adapters" / "cli" / "damage.py"
        broken = runpy.run_path(str(damage))["damage"]() if damage.is_file() else None
        if broken is None:
            raise
        sys.exit(f"Error: {broken}")
    command()
