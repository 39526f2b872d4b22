"""An import contract: across packages only names that an `__init__` lists."""

import ast
from collections.abc import Iterator
from importlib.util import find_spec, resolve_name
from pathlib import Path

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output

NAME = "kronscope"


class PublicNames(Contract):
    """`from kronscope.PACKAGE... import NAME` needs NAME in `__all__` of that package.

    importers: packages whose files are held to it. packages: those they take names from. Imports
    inside a package are relative and free; `import kronscope.PACKAGE` would name nothing.
    """

    importers = fields.ListField(subfield=fields.StringField())
    packages = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:  # noqa: ARG002
        """Read the files themselves: which name is imported, a graph of modules does not know."""
        tree = _tree()
        found = [
            f"{path.relative_to(tree)}:{line}: {module}.{name}"
            for importer in self.importers
            for path in _files(tree / importer)
            for line, module, name in _taken(path, tree)
            if self._is_private(tree, module, name)
        ]
        return ContractCheck(kept=not found, metadata={"found": found})

    def _is_private(self, tree: Path, module: str, name: str) -> bool:
        top, _, inside = module.partition(".")
        package = inside.partition(".")[0]
        if top != NAME or package not in self.packages:
            return False
        face = tree.joinpath(*inside.split("."), "__init__.py")
        return not face.exists() or name not in _listed(face)

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Each import that reaches past an `__init__`."""
        for line in check.metadata["found"]:
            output.print_error(f"{line} is not listed by its package")


def _tree() -> Path:
    """Folder of the packages that are asked about: the graph's, the first on the path."""
    found = find_spec(NAME)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"no package {NAME} on the path")
    return Path(found.origin).parent


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: the packages are not beside {NAME}/__init__")
    return sorted(folder.rglob("*.py"))


def _taken(path: Path, tree: Path) -> Iterator[tuple[int, str, str]]:
    """Line, module and name of each import of a file that leaves the file's own package."""
    folder = ".".join((NAME, *path.parent.relative_to(tree).parts))
    own = ".".join(folder.split(".")[:2])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), folder)
            if node.level == 0 or not f"{module}.".startswith(f"{own}."):
                yield from ((node.lineno, module, alias.name) for alias in node.names)


def _listed(face: Path) -> list[str]:
    for node in ast.parse(face.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            own = (name for name in node.value.elts if not isinstance(name, ast.Starred))
            return [ast.literal_eval(name) for name in own]
    return []
