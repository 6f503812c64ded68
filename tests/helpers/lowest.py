"""Print the lowest versions that pyproject.toml admits, one `name==version` per line: a constraints file for pip.

`make test-lowest` installs them. Packages that pyproject.toml does not name are as pip chooses them.
"""

import re
import sys
import tomllib
from pathlib import Path

EXTRAS = ("cpu", "test")


def lowest(pyproject: Path) -> dict[str, str]:
    """Return each requirement's lower bound by the package's name."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    bounds = {}
    for requirement in listed:
        found = re.match(r"([\w.-]+)>=([\w.]+)", requirement)
        if found is None:
            raise ValueError(f"{requirement!r} in {pyproject} has no lower bound; state one as NAME>=VERSION")
        bounds[found[1]] = found[2]
    return bounds


if __name__ == "__main__":
    made = lowest(Path(__file__).parents[2] / "pyproject.toml")
    sys.stdout.write("".join(f"{name}=={version}\n" for name, version in made.items()))
