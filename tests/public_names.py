"""An import contract: across packages only names that an `__init__` lists."""

import ast
from pathlib import Path

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output

ROOT = Path(__file__).parents[1]


class PublicNames(Contract):
    """`from kronscope.PACKAGE... import NAME` needs NAME in `__all__` of that package.

    importers: folders whose files are held to it. packages: those they take names from; imports
    inside a package are relative and free.
    """

    importers = fields.ListField(subfield=fields.StringField())
    packages = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:  # noqa: ARG002
        """Read the files themselves: which name is imported, a graph of modules does not know."""
        found = [
            f"{path.relative_to(ROOT)}:{node.lineno}: {node.module}.{alias.name}"
            for folder in self.importers
            for path in sorted((ROOT / folder).rglob("*.py"))
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom) and node.level == 0
            for alias in node.names
            if self._is_private(node.module or "", alias.name)
        ]
        return ContractCheck(kept=not found, metadata={"found": found})

    def _is_private(self, module: str, name: str) -> bool:
        top, _, inside = module.partition(".")
        if top != "kronscope" or inside.partition(".")[0] not in self.packages:
            return False
        face = ROOT.joinpath(*inside.split("."), "__init__.py")
        return not face.exists() or name not in _listed(face)

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Each import that reaches past an `__init__`."""
        for line in check.metadata["found"]:
            output.print_error(f"{line} is not listed by its package")


def _listed(face: Path) -> list[str]:
    for node in ast.parse(face.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            own = (name for name in node.value.elts if not isinstance(name, ast.Starred))
            return [ast.literal_eval(name) for name in own]
    return []
